"""Reading pickles of strangers without importing or calling anything that they name.

A pickle is a program. Here its machine is Python's own, in Python, with the few instructions replaced that reach out of
the data: every class or function becomes a stand-in that only keeps what it was called with, no object but a stand-in
is filled, and no key is hashed that could take long. The C implementation can not be bent so, and takes sizes that a
pickle only claims at their word.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch

# A trillion weights in a thousand pieces each are described in about 100 MB. In memory a pickle may grow a hundredfold.
LARGEST = 512 * 2**20
# Of different classes and functions that one pickle names; a run of Megatron-LM names some fifty.
_MOST_NAMES = 10_000
# The state of a generator of random numbers has some of 128 bits.
_MOST_BITS = 512
# Values that `plain` gives, each counted as often as it is referred to; and how deep they are.
MOST_VALUES = 5_000_000
DEEPEST = 200


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


def load_inert(content: bytes, with_tensors: bool = False, is_allowed: Callable[[str], bool] | None = None) -> Any:
    """What a pickle describes: plain data, and a StandIn for all else, or the class StandIn where it only names it.

    with_tensors: it was written by torch.save, which keeps the values of tensors elsewhere; they are left out.
    is_allowed: whether a class or function of this name may be named anywhere, also where nothing of it is left at the
    end; None for any. Raises pickle.UnpicklingError, and whatever else a damaged pickle leads to.
    """
    if len(content) > LARGEST:
        raise pickle.UnpicklingError(f"it is larger than {LARGEST // 2**20} MiB")
    return _Machine(io.BytesIO(content), with_tensors, is_allowed).load()


def plain(loaded: Any) -> Any:
    """What `load_inert` returns, with stand-ins of plain data turned into that, inside containers as well.

    A namespace becomes a dict; a path its text; a torch.dtype itself. Each object once, as pickles share them. Raises
    pickle.UnpicklingError if it is so deep, or refers to its parts so often, that to write it out would not end.
    """
    made = _Plain().convert(loaded)
    _Extent().check(made)
    return made


class _Machine(pickle._Unpickler):  # the documented one is C, and can not be changed
    """Knows no class but StandIn: not even harmless ones of other modules, which a pickle could change."""

    dispatch: ClassVar = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: Any, with_tensors: bool, is_allowed: Callable[[str], bool] | None) -> None:
        super().__init__(file)
        self._with_tensors, self._is_allowed = with_tensors, is_allowed
        self._known: dict[str, type[StandIn]] = {}

    def find_class(self, module: str, name: str) -> type[StandIn]:
        # torch.save writes the names of Python 2.
        qualified = f"{module.replace('__builtin__', 'builtins')}.{name}"
        if qualified not in self._known:
            if self._is_allowed is not None and not self._is_allowed(qualified):
                raise pickle.UnpicklingError(f"it names {qualified}, which does not belong there")
            if len(self._known) == _MOST_NAMES:
                raise pickle.UnpicklingError(f"it names more than {_MOST_NAMES} classes")
            self._known[qualified] = type("StandIn", (StandIn,), {"qualified": qualified})
        return self._known[qualified]

    def persistent_load(self, reference: Any) -> None:
        """The memory of a tensor, which nobody needs here."""
        if not self._with_tensors:
            raise pickle.UnpicklingError("it refers to objects outside of it")

    def load_build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], StandIn):
            # A class, say: filling one changes it for everybody.
            raise pickle.UnpicklingError(f"it fills a {type(self.stack[-1]).__name__}")
        self.stack[-1].state = state

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({_key(key): value for key, value in zip(items[::2], items[1::2], strict=True)})

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._fill([key, value])

    def load_setitems(self) -> None:
        self._fill(self.pop_mark())

    def _fill(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, (dict, StandIn)):
            raise pickle.UnpicklingError(f"it gives keys to a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key) if isinstance(target, dict) else key] = value

    def load_bytearray8(self) -> None:
        # Python makes room for as much as is claimed.
        self.append(self.read(int.from_bytes(self.read(8), "little")))

    def load_long(self) -> None:
        super().load_long()
        _check_number(self.stack[-1])

    def load_long1(self) -> None:
        super().load_long1()
        _check_number(self.stack[-1])

    def load_long4(self) -> None:
        super().load_long4()
        _check_number(self.stack[-1])

    def load_additems(self) -> None:
        items = self.pop_mark()
        for item in items:
            self.stack[-1].add(_key(item))

    def load_frozenset(self) -> None:
        self.append(frozenset(map(_key, self.pop_mark())))

    def get_extension(self, code: int) -> None:
        raise pickle.UnpicklingError("it names a class by a number")

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.DICT[0]] = load_dict
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.ADDITEMS[0]] = load_additems
    dispatch[pickle.FROZENSET[0]] = load_frozenset
    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8
    dispatch[pickle.LONG[0]] = load_long
    dispatch[pickle.LONG1[0]] = load_long1
    dispatch[pickle.LONG4[0]] = load_long4


def _check_number(number: int) -> None:
    """Raises an error for a number that no message could show, and no float hold."""
    if number.bit_length() > _MOST_BITS:
        raise pickle.UnpicklingError(f"it holds a number of {number.bit_length()} bits")


def _key(key: Any) -> Any:
    """Raises an error for a key that takes long to hash: tuples of tuples of ... the same."""
    if isinstance(key, tuple) and (len(key) > 16 or any(isinstance(part, (tuple, frozenset)) for part in key)):
        raise pickle.UnpicklingError("it has a key of nested tuples")
    return key


_NAMESPACES = {"argparse.Namespace", "types.SimpleNamespace"}
_MAPPINGS = {"collections.OrderedDict", "collections.defaultdict"}
_TUPLES = {"torch.Size", "builtins.tuple", "builtins.list", "builtins.set", "builtins.frozenset"}


class _Plain:
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
            return self._keep(value, tuple(self.convert(item) for item in value))
        if isinstance(value, type):
            return dtype_named(value) or value
        return self._stand_in(value) if isinstance(value, StandIn) else value

    def _keep(self, owner: Any, made: Any) -> Any:
        self._done[id(owner)] = made
        return made

    def _mapping(self, owner: Any, pairs: Any) -> dict[Any, Any]:
        made: dict[Any, Any] = {}
        self._done[id(owner)] = made
        for key, item in pairs:
            made[key if isinstance(key, str) else _key(self.convert(key))] = self.convert(item)
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
            return self._keep(value, tuple(self.convert(item) for item in value.args[0]))
        if name.startswith("pathlib."):
            return self._keep(value, "/".join(map(str, value.args)).replace("//", "/"))
        self._done[id(value)] = value
        value.args = tuple(self.convert(item) for item in value.args)
        value.state = self.convert(value.state)
        return value


class _Extent:
    """How much data is if all that is shared in it were written out, as a message or another file writes it."""

    def __init__(self) -> None:
        self._measured: dict[int, tuple[int, int]] = {}

    def check(self, value: Any) -> tuple[int, int]:
        """Values and levels. What stands in itself counts once: it is never written out."""
        parts = _parts(value)
        if not parts:
            return 1, 1
        if id(value) not in self._measured:
            self._measured[id(value)] = 1, 1
            below = [self.check(part) for part in parts]
            size, levels = 1 + sum(size for size, _ in below), 1 + max(levels for _, levels in below)
            if size > MOST_VALUES or levels > DEEPEST:
                raise pickle.UnpicklingError("it is too deep, or refers to its parts too often")
            self._measured[id(value)] = size, levels
        return self._measured[id(value)]


def _parts(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple)):
        return list(value)
    return [*value.args] if isinstance(value, StandIn) else []


def dtype_named(named: Any) -> torch.dtype | None:
    """The torch.dtype that a class StandIn stands for; None for others."""
    module, _, name = getattr(named, "qualified", "").rpartition(".")
    found = getattr(torch, name, None) if module == "torch" else None
    return found if isinstance(found, torch.dtype) else None
