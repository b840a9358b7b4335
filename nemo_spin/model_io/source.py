"""An opened checkpoint, whatever its family: its architecture, its tokenizer, its weights."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from nemo_spin.errors import CheckpointError, one_line
from nemo_spin.megatron.architecture import Architecture
from nemo_spin.model_io.contradictions import check_against
from nemo_spin.model_io.stores.interface import StoredTensor, WeightStore
from nemo_spin.model_io.tokenizers.description import TokenizerDescription
from nemo_spin.runtime.collectives import gathered


@dataclass
class CheckpointSource:
    """What `open_checkpoint` yields. Its files may be temporary: use it inside.

    path: the checkpoint, which may lie inside the directory that the user gave (`chosen` then says so).
    family: "nemo1", "nemo2", "megatron" (Megatron-LM), "bridge" (Megatron-Bridge) or "huggingface".
    layout: how the weights are stored: "torch_dist", "zarr" or "safetensors".
    config: the family's configuration, plain data. tokenizer: as the configuration describes it, None where it does
    not. files_dir: where its files are. written_by: the program and its version, as far as the checkpoint says.
    trained_layout: tensor- and pipeline-parallel size of the run that wrote it, as far as it says.
    """

    path: Path
    family: str
    layout: str
    config: Mapping[str, Any]
    tokenizer: TokenizerDescription | None
    files_dir: Path
    written_by: str | None = field(default=None, kw_only=True)
    trained_layout: tuple[int, int] | None = field(default=None, kw_only=True)
    chosen: str | None = field(default=None, kw_only=True)
    _store: WeightStore = field(repr=False, kw_only=True)
    # vocab_size -> the architecture that the configuration describes
    _architecture: Callable[[int | None], Architecture] = field(repr=False, kw_only=True)
    # Unpacks the weights and returns where they are; None where they are already.
    _unpack: Callable[[], Path] | None = field(repr=False, default=None, kw_only=True)
    _store_in: Callable[[Path], WeightStore] | None = field(repr=False, default=None, kw_only=True)

    @property
    def places(self) -> list[Path]:
        """Where files that the configuration names may be: among the checkpoint's own, and beside it."""
        return [self.files_dir, self.path.resolve().parent]

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """What is stored, by megatron-core's names, layers one by one."""
        return self._store.tensors

    def architecture(self, vocab_size: int | None = None) -> Architecture:
        """The model's architecture, checked against the stored tensors.

        vocab_size: number of ids of the tokenizer, which counts where the configuration gives no vocab_size.
        Raises CheckpointError for what is not supported, and where configuration and tensors contradict each other.
        """
        with understood(self.path):
            architecture = self._architecture(vocab_size)
        check_against(self.tensors, architecture, str(self.path))
        return architecture

    def weights(self) -> WeightStore:
        """The weights. An archive is unpacked at the first call, once per machine: every process of the default
        process group, if there is one, has to call it. Raises CheckpointError.
        """
        if self._unpack is not None:
            self._store = self._store_in(_once_per_machine(self._unpack))
            self._unpack = None
        return self._store


@contextmanager
def understood(path: Path) -> Iterator[None]:
    """Turns what a description of the wrong kind leads to, a list for a number for example, into a CheckpointError."""
    try:
        yield
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        reason = one_line(error)[:200]
        raise CheckpointError(
            f"{path} cannot be understood ({type(error).__name__}: {reason}): its description is damaged, or not as "
            "the program that it names writes it; use another checkpoint."
        ) from error


def described(
    describe: Callable[[Any, str], TokenizerDescription | None], node: Any, origin: str
) -> TokenizerDescription | None:
    """The tokenizer as the configuration describes it; None where it does not, or not as it should: another tokenizer
    may take its place."""
    try:
        return describe(node, origin)
    except CheckpointError:
        return None


def layout_in(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """(tensor_model_parallel_size, pipeline_model_parallel_size), which NeMo and Megatron call the same."""
    sizes = tuple(config.get(f"{kind}_model_parallel_size") for kind in ("tensor", "pipeline"))
    return sizes if all(type(size) is int and size > 0 for size in sizes) else None


def _once_per_machine(extract: Callable[[], Path]) -> Path:
    if not dist.is_initialized():
        return extract()
    hosts = gathered(socket.gethostname())
    first_here = hosts.index(hosts[dist.get_rank()])
    outcome: Path | CheckpointError | None = None
    if dist.get_rank() == first_here:
        try:
            outcome = extract()
        except CheckpointError as error:
            outcome = error
    outcomes = gathered(outcome)
    for failure in outcomes:
        if isinstance(failure, CheckpointError):
            raise failure
    return outcomes[first_here]
