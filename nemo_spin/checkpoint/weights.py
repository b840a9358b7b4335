"""Weights in and out of a model: torch_dist directories of megatron-core, at any tensor x pipeline layout.

A checkpoint does not know the layout that it was saved with; every process reads the slices that it holds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.models.gpt.gpt_model import GPTModel

from nemo_spin.checkpoint.sharded import save_sharded
from nemo_spin.checkpoint.source import CheckpointSource
from nemo_spin.checkpoint.stored import EMBEDDING, OUTPUT_LAYER, StoredTensor, layers_are_stacked, read_stored_tensors
from nemo_spin.errors import CheckpointError


def load_weights(model: GPTModel, source: CheckpointSource) -> None:
    """Fill this rank's part of the model from an opened checkpoint; every rank has to call it.

    Stored dtypes are converted to the model's. Embedding rows beyond the stored ones become zero (megatron-core's
    doing). Raises CheckpointError if a weight is missing or has another shape.
    """
    load_directory(model, source.weights_dir(), source.key_prefix, source.tensors, str(source.path))


def load_directory(
    model: GPTModel,
    directory: Path,
    prefix: str,
    tensors: Mapping[str, StoredTensor] | None = None,
    origin: str | None = None,
) -> None:
    """As `load_weights`, from a torch_dist directory.

    prefix: before the names of the stored weights. tensors: what is stored, read from the directory if not given.
    origin: names the checkpoint in messages.
    """
    origin = origin or str(directory)
    if tensors is None:
        tensors = read_stored_tensors(Path(directory), prefix, origin)
    state = _sharded_state(model, prefix, {"non_homogeneous_layers": not layers_are_stacked(tensors)})
    stored = {prefix + key for key in tensors}
    for name, entry in state.items():
        if entry.key not in stored:
            raise CheckpointError(f"{origin} holds no tensor {entry.key}, which the model needs for its {name}.")
    try:
        with _without_common_state(Path(directory)) as view:
            loaded = dist_checkpointing.load(state, str(view))
    except (CheckpointingException, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"The weights of {origin} cannot be read: {' '.join(str(error).split())[:300]}"
        ) from error
    result = model.load_state_dict({name.removeprefix(prefix): loaded[name] for name in state}, strict=False)
    missing = [name for name in result.missing_keys if not name.endswith("_extra_state")]
    if missing or result.unexpected_keys:
        raise CheckpointError(f"{origin} does not fill the model: {(missing or result.unexpected_keys)[0]} is left.")
    # The process that unpacked an archive may remove the files when this returns.
    dist.barrier()


def save_weights(model: GPTModel, directory: str | Path, vocab_rows: int, prefix: str = "model.") -> None:
    """Write the weights of all ranks as a torch_dist directory, under the names that NeMo gives them; every rank calls.

    model: this rank's part. vocab_rows: rows of the embedding to write (`Architecture.vocab_rows`): those that only
    this layout needs are not. prefix: before the names, "model." for NeMo 1 and "module." for NeMo 2.
    The directory is created; what it holds is whole when the call returns on every rank.
    """
    directory = Path(directory)
    if dist.get_rank() == 0:
        directory.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    state = _sharded_state(model, prefix, {})
    for name, entry in state.items():
        if entry.key in (prefix + EMBEDDING, prefix + OUTPUT_LAYER) and entry.global_shape[0] > vocab_rows:
            state[name] = _without_padding(entry, vocab_rows)
    save_sharded(state, directory)
    dist.barrier()


def _without_padding(entry: ShardedTensor, vocab_rows: int) -> ShardedTensor:
    """The first rows of a [vocabulary, hidden] weight in one piece; megatron-core only saves pieces of one size."""
    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(entry.data) for _ in range(group.size())]
    dist.all_gather(parts, entry.data.contiguous(), group=group)
    stage, _, data_parallel = entry.replica_id
    return ShardedTensor.from_rank_offsets(
        entry.key, torch.cat(parts)[:vocab_rows], replica_id=(stage, group.rank(), data_parallel)
    )


def _sharded_state(model: GPTModel, prefix: str, metadata: dict[str, Any]) -> dict[str, Any]:
    state = model.sharded_state_dict(prefix=prefix, metadata=metadata)
    return {name: entry for name, entry in state.items() if not name.endswith("_extra_state")}


@contextmanager
def _without_common_state(directory: Path) -> Iterator[Path]:
    """A view of the directory in which common.pt is empty.

    Weights never need it, and torch refuses to load what training runs put there (paths, arguments, callbacks).
    """
    with tempfile.TemporaryDirectory(prefix="nemo_spin_view_") as view:
        for file in directory.resolve().iterdir():
            if file.name != "common.pt":
                (Path(view) / file.name).symlink_to(file)
        torch.save({}, Path(view) / "common.pt")
        yield Path(view)
