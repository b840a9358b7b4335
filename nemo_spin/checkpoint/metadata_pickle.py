"""Reading `.metadata`, the pickle in which torch and megatron-core describe a torch_dist directory.

Only the classes that they write there are allowed, so that a file made to run code is refused before anything else
opens it.
"""

from __future__ import annotations

import enum
import pickle
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from nemo_spin.errors import CheckpointError

_ALLOWED_MODULES = ("torch.distributed.checkpoint.", "torch.distributed._shard.", "megatron.core.dist_checkpointing.")
_ALLOWED_NAMES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
}


def read_metadata(file: Path, origin: str) -> Metadata:
    """What `.metadata` says. origin: names the checkpoint in messages. Raises CheckpointError if it cannot be read."""
    try:
        with open(file, "rb") as opened:
            metadata = _MetadataUnpickler(opened).load()
        # What readers need of it; a stranger's file may be a valid pickle of something else.
        _ = metadata.state_dict_metadata.items(), (metadata.storage_data or {}).items()
    except Exception as error:
        raise CheckpointError(
            f"{origin}: {file.parent.name}/{file.name} cannot be read ({type(error).__name__}: {error}): it is "
            "damaged, or written by a torch or megatron-core newer than this one."
        ) from None
    return metadata


def _enum_member(owner: type, name: str) -> Any:
    """Stands in for getattr, by which Python 3.11 pickles enum members."""
    if not (isinstance(owner, type) and issubclass(owner, enum.Enum)):
        raise pickle.UnpicklingError(f"getattr of {owner!r}")
    return owner[name]


def _is_record(found: Any) -> bool:
    """Whether it is a class that holds data only. megatron-core has empty stand-ins for those of older releases."""
    return (
        isinstance(found, type)
        and found.__module__.startswith(_ALLOWED_MODULES)
        and (is_dataclass(found) or issubclass(found, enum.Enum) or found.__init__ is object.__init__)
    )


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        found = None
        if (module, name) in _ALLOWED_NAMES or module.startswith(_ALLOWED_MODULES):
            found = super().find_class(module, name)
        # Inside the allowed modules only plain records: not functions, not what these modules import.
        if (module, name) in _ALLOWED_NAMES or _is_record(found):
            return found
        raise pickle.UnpicklingError(f"{module}.{name}")
