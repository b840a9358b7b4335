"""What Megatron stores beside the weights of a torch_dist directory: `args`, `iteration`, ... as plain data.

It is a pickle that names classes of whatever training code wrote it, some of which do not exist here. Nothing that
it names is imported or called: every class or function becomes a stand-in that only keeps what it was called with,
and the few kinds that are plain data at heart are turned into that afterwards.

Until megatron-core 0.18 it is a file of its own, common.pt; since then an object inside the `.distcp` files.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from nemo_spin.checkpoint.metadata_pickle import read_metadata
from nemo_spin.errors import CheckpointError

FILE = "common.pt"
_KEY = "common_state"


class StandIn:
    """In place of an object whose class is not known here: what the pickle says of it.

    type(it).qualified is the name of the class or function. args: what it was called with. state: what it was filled
    with. items: what was added to it.
    """

    qualified = ""
    args: tuple[Any, ...]
    state: Any
    items: list[Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> StandIn:
        made = super().__new__(cls)
        made.args, made.state, made.items = (*args, *kwargs.values()), None, []
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """All is in __new__, which is what pickles call."""

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __call__(self, *args: Any) -> StandIn:
        return StandIn(self, *args)

    def append(self, item: Any) -> None:
        self.items.append(item)

    extend = append
    add = append

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def __repr__(self) -> str:
        return f"{self.qualified}({', '.join(map(repr, self.args))})"


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
            loaded = _read_archive(file.read_bytes())
        else:
            name = f"{directory.name}: {_KEY}"
            content = _object_in_shards(directory, origin)
            if content is None:
                return {}
            loaded = _read_archive(content)
    except CheckpointError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{origin}: {name} cannot be read ({type(error).__name__}: {reason}): it is damaged; copy it again or use "
            "another checkpoint."
        ) from None
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
                return shard.read(place.length)
    return None


def _read_archive(content: bytes) -> Any:
    """What torch.save wrote, without the values of tensors."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        pickles = [entry for entry in archive.infolist() if entry.filename.split("/", 1)[-1] == "data.pkl"]
        if len(pickles) != 1 or pickles[0].compress_type != zipfile.ZIP_STORED:
            raise pickle.UnpicklingError("it is no archive that torch.save writes")
        with archive.open(pickles[0]) as opened:
            return _Plain().convert(_Unpickler(opened).load())


class _Unpickler(pickle.Unpickler):
    """Knows no class but StandIn: not even harmless ones of other modules, which a pickle could change."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self._known: dict[str, type[StandIn]] = {}

    def find_class(self, module: str, name: str) -> type[StandIn]:
        # torch.save writes the names of Python 2.
        qualified = f"{module.replace('__builtin__', 'builtins')}.{name}"
        if qualified not in self._known:
            self._known[qualified] = type("StandIn", (StandIn,), {"qualified": qualified})
        return self._known[qualified]

    def persistent_load(self, reference: Any) -> None:
        """The memory of a tensor, which nobody needs here."""


_NAMESPACES = {"argparse.Namespace", "types.SimpleNamespace"}
_MAPPINGS = {"collections.OrderedDict", "collections.defaultdict"}
_TUPLES = {"torch.Size", "builtins.tuple", "builtins.list", "builtins.set", "builtins.frozenset"}


class _Plain:
    """Turns stand-ins of plain data into that, inside containers as well; each object once, as pickles share them."""

    def __init__(self) -> None:
        self._done: dict[int, Any] = {}

    def convert(self, value: Any) -> Any:
        if id(value) in self._done:
            return self._done[id(value)]
        if isinstance(value, dict):
            return self._mapping(value, value.items())
        if isinstance(value, (list, set, frozenset)):
            made: list[Any] = []
            self._done[id(value)] = made
            made.extend(self.convert(item) for item in value)
            return made
        if isinstance(value, tuple):
            return tuple(self.convert(item) for item in value)
        if isinstance(value, type):
            return _dtype(value) or value
        return self._stand_in(value) if isinstance(value, StandIn) else value

    def _mapping(self, owner: Any, pairs: Any) -> dict[Any, Any]:
        made: dict[Any, Any] = {}
        self._done[id(owner)] = made
        for key, item in pairs:
            made[key if isinstance(key, str) else self.convert(key)] = self.convert(item)
        return made

    def _stand_in(self, value: StandIn) -> Any:
        name = value.qualified
        if name in _NAMESPACES and isinstance(value.state, dict):
            return self._mapping(value, value.state.items())
        if name in _MAPPINGS:
            # A pickle may fill it item by item, or hand over a list of pairs.
            given = next((argument for argument in value.args if isinstance(argument, list)), [])
            return self._mapping(value, [*given, *value.items])
        if name in _TUPLES and len(value.args) == 1 and isinstance(value.args[0], (list, tuple)):
            return tuple(self.convert(item) for item in value.args[0])
        if name.startswith("pathlib."):
            return "/".join(map(str, value.args)).replace("//", "/")
        self._done[id(value)] = value
        value.args = tuple(self.convert(item) for item in value.args)
        value.state = self.convert(value.state)
        return value


def _dtype(named: type) -> torch.dtype | None:
    module, _, name = getattr(named, "qualified", "").rpartition(".")
    found = getattr(torch, name, None) if module == "torch" else None
    return found if isinstance(found, torch.dtype) else None


def member_of(value: Any) -> str | int | None:
    """Of a stand-in for a member of an enum, its name or its value, whichever the pickle gives; None for others."""
    if isinstance(value, StandIn) and value.args:
        last = value.args[-1]
        return last if isinstance(last, (str, int)) else None
    return None
