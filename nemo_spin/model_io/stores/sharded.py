"""Writing sharded state: megatron-core plans which rank writes what, this module writes it.

megatron-core's own writers start processes: those outlive a run that is killed, and tell of an error only as text, on
the first rank. Here a rank writes its part itself, in whatever thread calls `write`; only planning is collective.
"""

from __future__ import annotations

import inspect
import io
import queue
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch import Tensor
from torch.distributed.checkpoint.storage import WriteResult

from nemo_spin.errors import UserError
from nemo_spin.model_io.stores.common_state import FILE as COMMON_FILE
from nemo_spin.runtime.collectives import gathered, of_first

T = TypeVar("T")
# Until megatron-core 0.18 plain values are a file of their own, since then an object inside the shards.
_COMMON_IS_A_FILE = hasattr(serialization, "get_default_save_common_strategy")


class ShardWriter:
    """This rank's part of a torch_dist directory, as megatron-core planned it.

    num_bytes: of the tensors and objects that this rank writes.
    """

    def __init__(self, writer: Any, metadata: Any) -> None:
        """writer: megatron-core's, after planning. metadata: of the whole directory, on the first rank."""
        self._writer = writer
        self._metadata = metadata
        self._directory = Path(writer.checkpoint_dir)
        self._common: bytes | None = None
        self._given: set[int] = set()
        self.num_bytes = sum(
            sum(len(data.getbuffer()) for _, data in objects) + sum(tensor.nbytes for _, tensor in tensors)
            for _, _, (objects, tensors) in writer.write_buckets
        )

    def hold(self, copy: bool) -> None:
        """Bring the tensors to host memory. copy: those of the given state that are there already as well, because they
        go on changing."""

        def held(tensor: Tensor) -> Tensor:
            return tensor.to("cpu", non_blocking=True, copy=copy and _memory(tensor) in self._given)

        self._writer.write_buckets = [
            (file, key, (objects, [(item, held(tensor)) for item, tensor in tensors]))
            for file, key, (objects, tensors) in self._writer.write_buckets
        ]
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def write(self) -> tuple[list[Path], list[WriteResult]]:
        """Write and sync this rank's files. Returns them, and where in them everything is. Raises OSError."""
        files, results = [], []
        if self._common is not None:
            files.append(self._directory / COMMON_FILE)
            files[-1].write_bytes(self._common)
        transforms = [self._writer.transforms] if hasattr(self._writer, "transforms") else []
        while self._writer.write_buckets:
            bucket = self._writer.write_buckets.pop(0)
            written: queue.Queue[Any] = queue.Queue()
            pending: queue.Queue[int] = queue.Queue()
            pending.put(0)
            self._writer.write_preloaded_data(transforms, 0, bucket, written, pending, use_fsync=True)
            _, outcome = written.get()
            if isinstance(outcome, Exception):
                raise _said_by_the_disk(outcome) or outcome
            files.append(Path(bucket[0]))
            results += outcome
        return files, results

    def finish(self, results: Sequence[Sequence[WriteResult]]) -> None:
        """Write the description of the directory, on the first rank, from what `write` returned on every rank."""
        self._writer.finish(self._metadata, results)
        save_config(CheckpointingConfig("torch_dist", 1), str(self._directory))


class _PlanOnly(TorchDistSaveShardedStrategy):
    """Stops where megatron-core would hand the plan to its own writers."""

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any, *_: Any) -> Any:
        return ShardWriter(writer, planned[1])


def plan_shards(state: dict[str, Any], directory: Path) -> ShardWriter:
    """Share out what is to be written; every rank calls it. The directory has to exist; nothing is written yet."""
    sharded, common = save_preprocess(state)
    if not _COMMON_IS_A_FILE:
        rank = dist.get_rank()
        sharded["common_state"] = ShardedObject("common_state", common, (1,), (0,), replica_id=rank)
    strategy = _PlanOnly("torch_dist", 1, thread_count=1)
    knows_others = "async_strategy" in inspect.signature(strategy.async_save).parameters
    with _without_manager_process():
        planned = strategy.async_save(sharded, str(directory), **({"async_strategy": "mcore"} if knows_others else {}))
    # What megatron-core has copied for writing lies elsewhere, and needs no second copy.
    planned._given = {
        _memory(shard.data)
        for shard in nested_values(sharded)
        if isinstance(shard, ShardedTensor) and shard.data is not None
    }
    if _COMMON_IS_A_FILE and dist.get_rank() == 0:
        buffer = io.BytesIO()
        torch.save(common, buffer)
        planned._common = buffer.getvalue()
    return planned


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@contextmanager
def _without_manager_process() -> Iterator[None]:
    """megatron-core's writer starts a process for a queue of results, where there is none yet; it is not used here."""
    kept = filesystem_async._results_queue
    filesystem_async._results_queue = kept or queue.SimpleQueue()
    try:
        yield
    finally:
        filesystem_async._results_queue = kept


def save_sharded(state: dict[str, Any], directory: Path) -> None:
    """Write a torch_dist directory, which has to exist; every rank calls it.

    Raises UserError, on every rank, if one of them cannot write its part.
    """
    writer = plan_shards(state, directory)
    writer.hold(copy=False)
    outcomes = gathered(_unless_refused(lambda: writer.write()[1]))
    error = next((outcome for outcome in outcomes if isinstance(outcome, OSError)), None)
    error = error or of_first(lambda: _unless_refused(lambda: writer.finish(outcomes)))
    if error is not None:
        raise UserError(
            f"{directory} cannot be written ({error.strerror or error}): make room, and run the same command again."
        ) from error


def _unless_refused(work: Callable[[], T]) -> T | OSError:
    """What it returns, or the error of the disk."""
    try:
        return work()
    except OSError as error:
        return error


def _said_by_the_disk(error: BaseException | None) -> OSError | None:
    """torch's writer loses count when a write fails, and complains of that; the error of the disk is behind it."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error
