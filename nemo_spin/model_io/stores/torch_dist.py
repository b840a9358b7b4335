"""torch_dist directories: megatron-core's distributed checkpoints, read and written piece by piece.

They are torch.distributed.checkpoint's format with a metadata.json and a common.pt beside it. Reading goes through
torch's own storage reader, writing through its writer; neither needs a model or a process group.
"""

from __future__ import annotations

import io
import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from nemo_spin.errors import CheckpointError, UserError
from nemo_spin.model_io.files import write_json
from nemo_spin.model_io.stores.extra_state import empty_extra_state, extra_state_keys
from nemo_spin.model_io.stores.interface import (
    LAYERS,
    Region,
    StoredTensor,
    WeightStore,
    check_file,
    damaged,
    incomplete,
)
from nemo_spin.model_io.stores.stacked import StackedStore, check_volume
from nemo_spin.model_io.untrusted.metadata_pickle import read_metadata
from nemo_spin.model_io.untrusted.plain_data import read_json
from nemo_spin.model_io.untrusted.torch_piece import check_piece

# Largest piece that is written at a time, in bytes.
_PIECE = 512 * 2**20


class TorchDistStore(StackedStore):
    """The weights of a torch_dist directory."""

    layout = "torch_dist"

    def __init__(self, directory: Path, prefix: str, origin: str, sizes: Mapping[str, int] | None = None) -> None:
        """prefix: before the names of weights. origin: names the checkpoint in messages. sizes: bytes of each file,
        where they are not unpacked yet.

        Raises CheckpointError if the directory is no torch_dist checkpoint, its `.metadata` cannot be read, or files
        are missing or cut off.
        """
        _check_backend(directory, origin)
        self.directory = directory
        self._metadata = read_metadata(directory / ".metadata", origin)
        if sizes is None:
            sizes = {file.name: file.stat().st_size for file in directory.iterdir() if file.is_file()}
        for piece in (self._metadata.storage_data or {}).values():
            check_file(piece.relative_path, sizes, piece.offset + piece.length, origin, directory.name)
        arrays = {
            key: StoredTensor(tuple(entry.size), entry.properties.dtype)
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        super().__init__(arrays, prefix, origin)
        check_volume(self.tensors.values(), sum(sizes.values()), origin)
        self._reader = _Reader(directory)
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    def _read(self, key: str, region: Region) -> Tensor:
        entry = self._metadata.state_dict_metadata[key]
        offsets, sizes = [part.start for part in region], [part.stop - part.start for part in region]
        wanted = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        # Not empty: pieces that overlap leave gaps, which are not to show what this process had in memory before.
        target = torch.zeros(sizes, dtype=entry.properties.dtype)
        items = create_read_items_for_chunk_list(key, entry, [wanted])
        if sum(math.prod(item.lengths) for item in items) < target.numel():
            raise incomplete(self.origin, f"not all of {key} is stored in it")
        try:
            self._reader.read_data(LoadPlan(items), _Into(target))
        except Exception as error:
            raise damaged(self.origin, key, error) from error
        return target


class _Reader(dcp.FileSystemReader):
    """torch's reader, which looks at each piece before torch.load does."""

    def _slice_file(self, file: Any, sinfo: Any) -> Any:
        check_piece(file, sinfo.offset, sinfo.length)
        return super()._slice_file(file, sinfo)


class _Into(dcp.DefaultLoadPlanner):
    """Where torch's reader puts the pieces that it reads."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        view = self._target
        for axis, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            view = view.narrow(axis, start, length)
        return view

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing is left to do: the reader copied into a view."""


def _check_backend(directory: Path, origin: str) -> None:
    """Raises CheckpointError unless the directory is a whole torch_dist checkpoint, as far as its names show."""
    if not (directory / ".metadata").is_file():
        raise incomplete(origin, f"{directory.name}/.metadata is missing, so it is not known which tensors it holds")
    try:
        backend = read_json(directory / "metadata.json")["sharded_backend"]
    except FileNotFoundError:
        raise incomplete(origin, f"{directory.name}/metadata.json is missing") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"{origin} is damaged: {directory.name}/metadata.json does not name its sharded_backend."
        ) from None
    if backend != "torch_dist":
        raise CheckpointError(
            f"{origin} stores its weights as {backend}, which is not supported: re-save it as torch_dist (in NeMo 1 "
            "with dist_ckpt_format: torch_dist)."
        )


def write_torch_dist(store: WeightStore, directory: Path, prefix: str) -> None:
    """Write the weights of a store as a torch_dist directory with stacked layers, one piece in memory at a time.

    directory: made here. prefix: before the names, "model." for NeMo 1, "module." for NeMo 2, none for Megatron-LM.
    Raises CheckpointError if a weight cannot be read.
    """
    directory.mkdir(parents=True, exist_ok=True)
    writer = dcp.FileSystemWriter(directory, single_file_per_rank=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.save({}, storage_writer=writer, planner=_PiecePlanner(store, prefix), no_dist=True)
        except CheckpointException as failed:
            raise _origin(failed) from failed
    torch.save({}, directory / "common.pt")
    backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    write_json(directory / "metadata.json", backends | {"common_backend": "torch", "common_backend_version": 1})


def _origin(failed: CheckpointException) -> BaseException:
    """Why torch's writer failed, which wraps all that is raised, Ctrl-C and a full disk included."""
    error, _ = next(iter(failed.failures.values()))
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, (UserError, OSError, KeyboardInterrupt)):
        cause = cause.__context__
    return cause or error


class _PiecePlanner(dcp.DefaultSavePlanner):
    """Tells torch's writer which pieces there are, and reads each one when its turn comes."""

    def __init__(self, store: WeightStore, prefix: str) -> None:
        super().__init__(flatten_state_dict=False)
        self._store, self._prefix = store, prefix
        self._layers_with = Counter(_within_layer(name) for name in store.tensors)
        self._sources: dict[MetadataIndex, tuple[str, Region]] = {}

    def create_local_plan(self) -> SavePlan:
        items = []
        for name, tensor in self._store.tensors.items():
            full, stack = self._stacked(name)
            shape = (*stack[1:], *tensor.shape)
            for region in _pieces(tensor):
                start = (*stack[:1], *(part.start for part in region))
                size = (*(1 for _ in stack[:1]), *(part.stop - part.start for part in region))
                chunk = ChunkStorageMetadata(torch.Size(start), torch.Size(size))
                index = MetadataIndex(full, chunk.offsets)
                self._sources[index] = (name, region)
                data = TensorWriteData(chunk, TensorProperties(dtype=tensor.dtype), torch.Size(shape))
                items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        for key in extra_state_keys(self._store.tensors, self._prefix):
            items.append(WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO))
        self.plan = SavePlan(items)
        return self.plan

    def _stacked(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Full name, and (layer, number of layers) for a weight of a layer."""
        if not name.startswith(LAYERS):
            return self._prefix + name, ()
        within = _within_layer(name)
        layer = int(name.removeprefix(LAYERS).split(".")[0])
        return f"{self._prefix}{LAYERS}{within}", (layer, self._layers_with[within])

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            return empty_extra_state()
        name, region = self._sources[write_item.index]
        piece = self._store.read(name, region)
        return piece.reshape(write_item.tensor_data.chunk.sizes).contiguous()


def _within_layer(name: str) -> str:
    return name.removeprefix(LAYERS).partition(".")[2] if name.startswith(LAYERS) else name


def _pieces(tensor: StoredTensor) -> Iterator[Region]:
    """Regions that cover the tensor, each of a bounded size: ranges of rows."""
    rows, rest = tensor.shape[0], tensor.shape[1:]
    at_a_time = max(1, _PIECE // (math.prod(rest) * tensor.dtype.itemsize))
    for start, stop in pairwise([*range(0, rows, at_a_time), rows]):
        yield (slice(start, stop), *(slice(0, size) for size in rest))
