"""Whether the pickles of a checkpoint to resume from hold data only.

megatron-core and torch open `.metadata`, and objects inside the shards, with a pickle reader that runs what a file
names. So each of them is read here first, by readers that do not.
"""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from nemo_spin.errors import CheckpointError
from nemo_spin.model_io.stores.common_state import FILE as COMMON_FILE
from nemo_spin.model_io.untrusted.metadata_pickle import read_metadata


def check_pickles(shards: Path, origin: str) -> None:
    """shards: a torch_dist directory. origin: names the checkpoint. Raises CheckpointError, which names the file."""
    metadata = read_metadata(shards / ".metadata", origin)
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
