"""Weights in and out of a model, at any tensor x pipeline layout.

A checkpoint does not know the layout that it was saved with; every process reads the regions that it holds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, apply_factories
from megatron.core.models.gpt.gpt_model import GPTModel

from nemo_spin.errors import CheckpointError
from nemo_spin.model_io.stores.extra_state import extra_state_keys
from nemo_spin.model_io.stores.interface import EMBEDDING, LAYERS, OUTPUT_LAYER, WeightStore
from nemo_spin.model_io.stores.sharded import save_sharded
from nemo_spin.runtime.watchdog import beat


@torch.no_grad()
def load_weights(model: GPTModel, store: WeightStore, origin: str) -> None:
    """Fill this rank's part of the model; every rank has to call it.

    Stored dtypes are converted to the model's. Embedding rows beyond the stored ones become zero.
    origin: names the checkpoint in messages. Raises CheckpointError if a weight is missing, has another shape or cannot
    be read.
    """
    state = _sharded_state(model, "", {"non_homogeneous_layers": True})
    apply_factories(state)
    for entry in nested_values(state):
        if not isinstance(entry, ShardedTensor):
            continue
        if entry.key not in store.tensors:
            raise CheckpointError(f"{origin} holds no tensor {entry.key}, which the model needs.")
        beat()
        # entry.data is the model's own memory: for the halves of a gated layer, a view of it.
        _fill(entry, store, origin)
    # The process that unpacked an archive may remove the files when this returns.
    dist.barrier()


def _fill(entry: ShardedTensor, store: WeightStore, origin: str) -> None:
    stored = store.tensors[entry.key].shape
    if not entry.allow_shape_mismatch and stored != tuple(entry.global_shape):
        raise CheckpointError(
            f"{origin}: tensor {entry.key} is {list(stored)}, but the model has {list(entry.global_shape)}."
        )
    region = tuple(
        slice(min(start, size), min(start + length, size))
        for start, length, size in zip(entry.global_offset, entry.local_shape, stored, strict=True)
    )
    target = entry.data
    if entry.allow_shape_mismatch:
        target.zero_()
        target = target[: region[0].stop - region[0].start]
    if target.numel():
        target.copy_(store.read(entry.key, region))


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
    if dist.get_rank() == 0:
        state |= _extra_states(state, prefix, model.config.num_layers)
    save_sharded(state, directory)
    dist.barrier()


def _extra_states(state: dict[str, Any], prefix: str, layers: int) -> dict[str, ShardedObject]:
    """Those of all layers, after the names of the weights in the first process's layers."""
    keys = {entry.key.removeprefix(prefix) for entry in state.values()}
    within = [key.removeprefix(LAYERS) for key in keys if key.startswith(LAYERS)]
    names = [f"{LAYERS}{layer}.{name}" for name in within for layer in range(layers)]
    return {key: ShardedObject.empty_from_unique_key(key) for key in extra_state_keys(names, prefix)}


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
