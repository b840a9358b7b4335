"""What Megatron stores beside the weights of a torch_dist directory: `args`, `iteration`, ... as plain data.

It is a pickle that names classes of whatever training code wrote it, some of which do not exist here. Nothing that
it names is imported or called, see `inert_pickle`.

Until megatron-core 0.18 it is a file of its own, common.pt; since then an object inside the `.distcp` files.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

from nemo_spin.errors import CheckpointError
from nemo_spin.model_io.stores.interface import damaged
from nemo_spin.model_io.untrusted.inert_pickle import LARGEST, StandIn, load_inert, plain
from nemo_spin.model_io.untrusted.metadata_pickle import read_metadata

FILE = "common.pt"
_KEY = "common_state"


def read_common_state(directory: Path, origin: str) -> dict[str, Any]:
    """The common state of a torch_dist directory; empty where it has none.

    A namespace, such as Megatron-LM's `args`, becomes a dict; a path its text; a torch.dtype itself; anything else that
    is no plain data (enums, functions, tensors) a StandIn, or the class StandIn where the pickle only names it.
    origin: names the checkpoint in messages. Raises CheckpointError if it is damaged.
    """
    file = directory / FILE
    name = f"{directory.name}/{FILE}"
    try:
        if file.is_file():
            with open(file, "rb") as opened:
                loaded = _read_archive(opened.read(LARGEST + 1))
        else:
            name = f"{directory.name}: {_KEY}"
            content = _object_in_shards(directory, origin)
            if content is None:
                return {}
            loaded = _read_archive(content)
    except CheckpointError:
        raise
    except Exception as error:
        raise damaged(origin, name, error) from None
    if isinstance(loaded, list) and len(loaded) == 1:
        loaded = loaded[0]
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{origin}: {name} holds a {type(loaded).__name__}, not the state of a training run.")
    return loaded


def _object_in_shards(directory: Path, origin: str) -> bytes | None:
    metadata = read_metadata(directory / ".metadata", origin)
    for index, place in (metadata.storage_data or {}).items():
        if index.fqn.split("/")[0] == _KEY:
            with open(directory / place.relative_path, "rb") as shard:
                shard.seek(place.offset)
                return shard.read(min(place.length, LARGEST + 1))
    return None


def _read_archive(content: bytes) -> Any:
    """What torch.save wrote, without the values of tensors."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        pickles = [entry for entry in archive.infolist() if entry.filename.split("/", 1)[-1] == "data.pkl"]
        if len(pickles) != 1 or pickles[0].compress_type != zipfile.ZIP_STORED:
            raise pickle.UnpicklingError("it is no archive that torch.save writes")
        with archive.open(pickles[0]) as opened:
            return plain(load_inert(opened.read(), with_tensors=True))


def member_of(value: Any) -> str | int | None:
    """Of a stand-in for a member of an enum, its name or its value, whichever the pickle gives; None for others."""
    if isinstance(value, StandIn) and value.args:
        last = value.args[-1]
        return last if isinstance(last, (str, int)) else None
    return None
