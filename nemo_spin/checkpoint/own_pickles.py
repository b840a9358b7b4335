"""Whether the pickles of a checkpoint to resume from hold data only.

megatron-core and torch open `.metadata`, and objects inside the shards, with a pickle reader that runs what a file
names, wherever it names it. So each of them is read here first, by readers that do not, and that allow only the names
which a run writes.
"""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from nemo_spin.errors import CheckpointError
from nemo_spin.model_io.stores.common_state import FILE as COMMON_FILE
from nemo_spin.model_io.untrusted.metadata_pickle import read_metadata

_DCP = "torch.distributed.checkpoint"
_MCORE = "megatron.core.dist_checkpointing.strategies"
_NAMES = frozenset(
    {
        "torch.Size",
        "torch.serialization._get_layout",
        "collections.OrderedDict",
        "pathlib.PosixPath",
        f"{_DCP}.filesystem._StorageInfo",
        f"{_MCORE}.torch.MCoreMetadata",
        f"{_MCORE}.torch.MCoreSavePlan",
        *(
            f"{_DCP}.metadata.{name}"
            for name in (
                "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
                "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
            )
        ),
        *(f"{_DCP}.planner.{name}" for name in ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")),
    }
)  # fmt: skip


def _is_written_by_runs(name: str) -> bool:
    return name in _NAMES or isinstance(getattr(torch, name.removeprefix("torch."), None), torch.dtype)


def check_pickles(shards: Path, origin: str) -> None:
    """shards: a torch_dist directory. origin: names the checkpoint. Raises CheckpointError, which names the file."""
    metadata = read_metadata(shards / ".metadata", origin, _is_written_by_runs)
    for index, place in metadata.storage_data.items():
        name = f"{shards.name}/{place.relative_path}"
        if getattr(place, "transform_descriptors", None) or Path(place.relative_path).name != place.relative_path:
            raise CheckpointError(f"{origin}: {shards.name}/.metadata describes {name} as no run writes it.")
        if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
            with open(shards / place.relative_path, "rb") as file:
                file.seek(place.offset)
                _check(file.read(place.length), f"{origin}: {index.fqn} in {name}")
    if (shards / COMMON_FILE).exists():
        _check((shards / COMMON_FILE).read_bytes(), f"{origin}: {shards.name}/{COMMON_FILE}")


def _check(content: bytes, what: str) -> None:
    try:
        torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{what} is not the plain data that a run writes ({type(error).__name__}): it is not opened."
        ) from None
