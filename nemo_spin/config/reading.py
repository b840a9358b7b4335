"""Reading a configuration into the dataclasses that declare it, with an error for each value that cannot be used."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, TypeVar, get_args, get_origin

from nemo_spin.config.schema import LoopConfig
from nemo_spin.config.settings import AS_DEFAULT, REQUIRED, Part, Section, parts
from nemo_spin.config.values import MISSING, checked, checked_each, is_list, shown
from nemo_spin.errors import ConfigError, MissingKeyError

_ABSENT = object()
_STAND_IN = "(to be given)"
_T = TypeVar("_T")


def at(cfg: Any, key: str, default: Any = None) -> Any:
    """The value of a key such as "model.spin.beta" in nested mappings; the default where there is none."""
    node: Any = cfg
    for name in key.split("."):
        if not isinstance(node, Mapping) or name not in node:
            return default
        node = node[name]
    return node


class Reader:
    """Reads dataclasses from a resolved configuration.

    errors: what was wrong so far. A wrong value is read as its default, a missing one as a text in its place, so that
        the rest can be looked at.
    each: of keys that take a list with one number per iteration, that list.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.errors: list[ConfigError] = []
        self.each: dict[str, tuple[Any, ...]] = {}
        self._values = values

    def read(self, cls: type[_T], path: str = "", without: str = "") -> _T:
        """A dataclass whose keys lie in the section `path`. without: what null means of a key that has to be given.

        A key that is absent has its default, and so has one that is null where null has no meaning of its own.
        """
        return cls(**{part.field: self._read(part, without) for part in parts(cls, path)})

    def error(self, key: str, says: str) -> ConfigError:
        """What is wrong with a key's value, and what to use instead."""
        return ConfigError(f"{key} = {shown(at(self._values, key))}: {says}.", key)

    def is_set(self, key: str) -> bool:
        """Whether a key is there, and is neither null nor to be given yet."""
        return at(self._values, key) not in (None, MISSING)

    def _read(self, part: Part, without: str) -> Any:
        if isinstance(part.declared, Section):
            if part.declared.given_by and not self._is_given(part):
                return None
            return self.read(part.type, part.key, part.declared.without)
        try:
            return self._value(part)
        except ValueError as error:
            self.errors.append(self.error(part.key, str(error)))
        except MissingKeyError:
            also = f", or set it to null for {without}" if without else ""
            self.errors.append(MissingKeyError(f"{part.key} is missing: set it{also}.", part.key))
        return self._as_declared(part, _STAND_IN if part.declared.is_required else part.declared.yaml_default)

    def _is_given(self, part: Part) -> bool:
        """Whether an optional section is there: one of its keys is set, or has to be given and is not yet."""
        required = {p.key for p in parts(part.type, part.key) if getattr(p.declared, "is_required", False)}
        keys = [f"{part.key}.{name}" for name in part.declared.given_by]
        return any(self.is_set(key) or (key in required and at(self._values, key) == MISSING) for key in keys)

    def _value(self, part: Part) -> Any:
        """Raises ValueError that says what to use, or MissingKeyError."""
        declared = part.declared
        value = at(self._values, part.key, _ABSENT)
        is_set = self.is_set(part.key)
        if not is_set and (declared.is_required or (declared.null is REQUIRED and value is not _ABSENT)):
            raise MissingKeyError
        return self._as_declared(part, value if is_set or value is None else declared.yaml_default)

    def _as_declared(self, part: Part, value: Any) -> Any:
        """A value that is set, or a default. Raises ValueError."""
        declared = part.declared
        if value is None and part.is_optional:
            return None
        if value is None and declared.null is not AS_DEFAULT:
            return declared.null
        if value is None:
            value = declared.yaml_default
        if not declared.per_iteration:
            return checked(value, part.type, declared)
        kind = get_args(part.type)[0] if get_origin(part.type) is tuple else part.type
        self.each[part.key] = each = self._each_iteration(value, kind, declared)
        return each[0] if kind is part.type else each

    def _each_iteration(self, value: Any, kind: type, declared: Any) -> tuple[Any, ...]:
        iterations = self._max_iterations
        if not is_list(value):
            return (checked(value, kind, declared),) * (iterations or 1)
        each = checked_each(value, kind, declared)
        if not each or len(each) != (iterations or len(each)):
            raise ValueError(
                f"it has {len(each)} values for trainer.spin.max_iterations = {iterations}; "
                "give one number, or one per iteration"
            )
        return each

    @cached_property
    def _max_iterations(self) -> int | None:
        """None where it is wrong."""
        part = next(part for part in parts(LoopConfig, "trainer.spin") if part.field == "max_iterations")
        try:
            return self._value(part)
        except ValueError:
            return None
