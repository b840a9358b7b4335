"""Declaring settings: a field of a dataclass says of a configuration key all that there is to say.

    max_iterations: int = setting(1, minimum=1, maximum=10_000)
    '''rounds of self-play'''

The annotation is the type, the text below it the documentation. From these declarations come the check of values
(`reading`), the known keys (`keys`), conf/gpt_spin.yaml and docs/configuration.md (`docs/make_configuration.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from types import NoneType
from typing import Any, get_args, get_type_hints

REQUIRED: Any = object()  # in place of a default, or of what null stands for: the value has to be given
AS_DEFAULT: Any = object()  # what null stands for: what an absent key does


@dataclass(frozen=True, slots=True)
class Setting:
    """What a key means and takes.

    default: REQUIRED where the value has to be given; a tuple is a list in the YAML, or one number if per_iteration.
    null: what null stands for where the type lacks None; REQUIRED where null is refused as missing.
    name: the key's name where it is not the field's; a full key if it lies in another section than its dataclass.
    minimum, above, maximum, below: bounds of numbers, of each one in a list. choices: of texts, in any case of letters.
    per_iteration: one number, or a list with one for each iteration.
    counts: of a count or a fraction: what is counted. read: takes the value in place of the check by type; raises
        ValueError that says what to use. words: for the documentation, the type that `read` takes.
    """

    default: Any
    null: Any = AS_DEFAULT
    name: str | None = None
    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    per_iteration: bool = False
    counts: str = ""
    read: Callable[[Any], Any] | None = None
    words: str = ""

    @property
    def is_required(self) -> bool:
        return self.default is REQUIRED

    @property
    def yaml_default(self) -> Any:
        """The default as it stands in the YAML."""
        if self.is_required:
            return None
        if isinstance(self.default, tuple):
            return self.default[0] if self.per_iteration else list(self.default)
        return deepcopy(self.default)


@dataclass(frozen=True, slots=True)
class Section:
    """A dataclass whose keys lie in the section `path`.

    like: the section whose keys give the defaults of those that the dataclass itself does not declare anew.
    given_by: of an optional one: it is None unless one of these keys is set. without: what null means then, in words.
    """

    path: str
    like: str | None = None
    given_by: tuple[str, ...] = ()
    without: str = ""


def setting(default: Any, **options: Any) -> Any:
    """A field that declares a key; options: see `Setting`."""
    declared = Setting(default, **options)
    metadata = {"setting": declared}
    if declared.is_required:
        return field(metadata=metadata)
    value = declared.null if default is None and declared.null is not AS_DEFAULT else default
    if isinstance(value, Mapping):
        return field(default_factory=lambda: dict(value), metadata=metadata)
    return field(default=value, metadata=metadata)


def section(path: str, default_factory: Any = MISSING, **options: Any) -> Any:
    """A field with a dataclass that declares keys of a section; options: see `Section`."""
    return field(default_factory=default_factory, metadata={"section": Section(path, **options)})


@dataclass(frozen=True, slots=True)
class Part:
    """A field of a dataclass, as it is declared.

    owner: the dataclass. key: the full key, of a section its path. type: without None, which is_optional says to be
        allowed as well.
    """

    owner: type
    field: str
    key: str
    type: Any
    is_optional: bool
    declared: Setting | Section


def parts(cls: type, path: str = "") -> Iterator[Part]:
    """The settings and sections that a dataclass declares for the section `path`, in its order."""
    hints = _hints(cls)
    for each in fields(cls):
        hint = hints[each.name]
        types = [kind for kind in get_args(hint) if kind is not NoneType]
        is_optional = NoneType in get_args(hint)
        kind = types[0] if is_optional and len(types) == 1 else hint
        if isinstance(declared := each.metadata.get("setting"), Setting):
            name = declared.name or each.name
            key = name if "." in name or not path else f"{path}.{name}"
            yield Part(cls, each.name, key, kind, is_optional, declared)
        elif isinstance(declared := each.metadata.get("section"), Section):
            yield Part(cls, each.name, declared.path, kind, is_optional, declared)


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def all_parts(cls: type, path: str = "") -> Iterator[tuple[Part, str | None]]:
    """The settings and sections of a dataclass and of those in it; keys may come twice.

    With each setting comes the key whose value is its default, where that is another's: see `Section.like`.
    """

    def below(cls: type, path: str, like: str | None) -> Iterator[tuple[Part, str | None]]:
        for part in parts(cls, path):
            inherits = like and part.field not in cls.__annotations__ and part.key.startswith(f"{path}.")
            yield part, f"{like}.{part.field}" if inherits else None
            if isinstance(part.declared, Section):
                yield from below(part.type, part.key, part.declared.like)

    return below(cls, path, None)
