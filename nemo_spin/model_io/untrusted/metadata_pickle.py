"""Reading `.metadata`, the pickle in which torch and megatron-core describe a torch_dist directory.

Nothing that it names is imported: it is read as data, and torch's own records are made of that here. What else is in
it, such as the plans by which it was written, is left out; so are files outside the directory and sizes that cannot be.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from nemo_spin.errors import CheckpointError, one_line
from nemo_spin.model_io.untrusted.inert_pickle import LARGEST, StandIn, dtype_named, load_inert

# An axis and a place in a file fit into 63 bits; a weight has four axes at most.
_MOST_AXES = 16
_LARGEST_NUMBER = 2**63


def read_metadata(file: Path, origin: str, is_allowed: Callable[[str], bool] | None = None) -> Metadata:
    """What `.metadata` says of the tensors, and of where in which file they are.

    origin: names the checkpoint in messages. is_allowed: see `load_inert`. Raises CheckpointError if the file cannot be
    read, or makes no sense.
    """
    try:
        with open(file, "rb") as opened:
            return _metadata(load_inert(opened.read(LARGEST + 1), is_allowed=is_allowed))
    except Exception as error:
        reason = one_line(error)[:200]
        raise CheckpointError(
            f"{origin}: {file.parent.name}/{file.name} cannot be read ({type(error).__name__}: {reason}): it is "
            "damaged, or written by a torch or megatron-core newer than this one."
        ) from None


def _metadata(loaded: Any) -> Metadata:
    fields = _fields(loaded, "Metadata", "MCoreMetadata")
    entries, storage = fields["state_dict_metadata"], fields.get("storage_data")
    if not isinstance(entries, dict) or not isinstance(storage, (dict, type(None))):
        raise pickle.UnpicklingError("it holds no description of tensors")
    return Metadata(
        {_text(name): _entry(entry) for name, entry in entries.items()},
        storage_data={_index(index): _place(place) for index, place in (storage or {}).items()},
    )


def _entry(entry: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if _class_name(entry) == "BytesStorageMetadata":
        return BytesStorageMetadata()
    fields = _fields(entry, "TensorStorageMetadata")
    size = _sizes(fields["size"])
    chunks = [_chunk(chunk, size) for chunk in fields["chunks"]]
    return TensorStorageMetadata(_properties(fields["properties"]), size, chunks)


def _properties(record: Any) -> TensorProperties:
    """Its state is a tuple that begins with the dtype; the rest (layout, memory format) is of no use here."""
    state = record.state if _class_name(record) == "TensorProperties" else None
    dtype = dtype_named(state[0]) if isinstance(state, tuple) and state else None
    if dtype is None:
        raise pickle.UnpicklingError("it gives a tensor no dtype that torch has")
    return TensorProperties(dtype=dtype)


def _chunk(record: Any, size: torch.Size) -> ChunkStorageMetadata:
    fields = _fields(record, "ChunkStorageMetadata")
    offsets, sizes = _sizes(fields["offsets"]), _sizes(fields["sizes"])
    if not len(offsets) == len(sizes) == len(size) or any(
        start + length > whole for start, length, whole in zip(offsets, sizes, size, strict=True)
    ):
        raise pickle.UnpicklingError("a piece of a tensor lies outside of it")
    return ChunkStorageMetadata(offsets, sizes)


def _index(record: Any) -> MetadataIndex:
    fields = _fields(record, "MetadataIndex")
    offset = fields.get("offset")
    return MetadataIndex(_text(fields["fqn"]), None if offset is None else _sizes(offset))


def _place(record: Any) -> _StorageInfo:
    fields = _fields(record, "_StorageInfo")
    name = _text(fields["relative_path"])
    if name in ("", ".", "..") or "/" in name or not name.isprintable():
        raise pickle.UnpicklingError(f"it names a file outside of its directory: {name[:100]!r}")
    if fields.get("transform_descriptors"):
        raise pickle.UnpicklingError("its tensors are compressed or otherwise transformed")
    return _StorageInfo(name, _number(fields["offset"]), _number(fields["length"]))


def _fields(record: Any, *names: str) -> dict[str, Any]:
    if _class_name(record) not in names or not isinstance(record.state, dict):
        raise pickle.UnpicklingError(f"it holds a {_class_name(record)} in place of a {names[0]}")
    return record.state


def _class_name(record: Any) -> str:
    """Of a stand-in for a record of torch or megatron-core, its class, in whatever module that is by now."""
    if not isinstance(record, StandIn):
        return type(record).__name__
    package, _, name = record.qualified.rpartition(".")
    return name if package.split(".")[0] in ("torch", "megatron") else record.qualified


def _sizes(record: Any) -> torch.Size:
    given = record.args[0] if isinstance(record, StandIn) and len(record.args) == 1 else record
    if _class_name(record) not in ("Size", "tuple", "list") or len(given) > _MOST_AXES:
        raise pickle.UnpicklingError(f"it holds a {_class_name(record)} in place of a shape")
    return torch.Size(map(_number, given))


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _LARGEST_NUMBER:
        raise pickle.UnpicklingError("it holds a size or place that cannot be")
    return value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise pickle.UnpicklingError(f"it holds a {type(value).__name__} in place of a name")
    return value
