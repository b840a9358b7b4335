"""Reading values of a configuration section: each method checks type and range, and its error names the full key."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_spin.errors import ConfigError, MissingKeyError

MISSING = "???"  # hydra's mark of a value that has to be given
_REQUIRED: Any = object()
_SHOWN = 300  # characters of a value in a message


class Section:
    """A mapping inside a configuration. A key that is absent or null has its default; without one it is required."""

    def __init__(self, values: Mapping[str, Any], name: str = "") -> None:
        self.name = name
        self._values = values

    def section(self, key: str) -> Section:
        return Section(self._values.get(key) or {}, self.path_of(key))

    def get(self, key: str, default: Any = None) -> Any:
        """The raw value, or the default."""
        value = self._values.get(key)
        if value is None or value == MISSING:
            if default is _REQUIRED:
                raise MissingKeyError(f"{self.path_of(key)} is missing: set it.", self.path_of(key))
            return default
        return value

    def is_to_be_given(self, key: str) -> bool:
        return self._values.get(key) == MISSING

    def error(self, key: str, what_to_do: str) -> ConfigError:
        path = self.path_of(key)
        return ConfigError(f"{path} = {shown(self._values.get(key))}: {what_to_do}.", path)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "use true or false")
        return value

    def optional_flag(self, key: str) -> bool | None:
        return None if self.get(key) is None else self.flag(key, False)

    def integer(self, key: str, default: Any = _REQUIRED, *, minimum: int, maximum: int | None = None) -> int:
        value = self.get(key, default)
        if not _is_integer(value) or value < minimum or (maximum is not None and value > maximum):
            upto = "" if maximum is None else f" and at most {maximum}"
            raise self.error(key, f"use a whole number of at least {minimum}{upto}")
        return value

    def optional_integer(self, key: str, *, minimum: int) -> int | None:
        return None if self.get(key) is None else self.integer(key, minimum=minimum)

    def number(
        self,
        key: str,
        default: Any = _REQUIRED,
        *,
        minimum: float = -math.inf,
        above: float = -math.inf,
        maximum: float = math.inf,
    ) -> float:
        value = self.get(key, default)
        if not is_number(value) or not (minimum <= value <= maximum and value > above):
            bounds = [f"at least {minimum:g}"] if minimum > -math.inf else []
            bounds += [f"above {above:g}"] if above > -math.inf else []
            bounds += [f"at most {maximum:g}"] if maximum < math.inf else []
            raise self.error(key, "use a finite number " + " and ".join(bounds))
        return float(value)

    def number_or_off(self, key: str, default: float, **bounds: float) -> float | None:
        """As `number`, but null, where it is given, is None: what the number limits is switched off."""
        return None if key in self._values and self._values[key] is None else self.number(key, default, **bounds)

    def optional_number(self, key: str, **bounds: float) -> float | None:
        return None if self.get(key) is None else self.number(key, **bounds)

    def numbers(self, key: str, default: Sequence[float]) -> tuple[float, ...]:
        value = self.get(key, default)
        if not _is_list(value) or not all(map(is_number, value)):
            raise self.error(key, "use a list of finite numbers")
        return tuple(map(float, value))

    def per_iteration(self, key: str, max_iterations: int, default: Any = _REQUIRED) -> tuple[float, ...]:
        """A positive number for all iterations, or a list with one for each."""
        value = self.get(key, default)
        numbers = self.numbers(key, ()) if _is_list(value) else (value,) * max_iterations
        if not all(is_number(number) and number > 0 for number in numbers):
            raise self.error(key, "use finite numbers above 0")
        self._check_length(key, numbers, max_iterations)
        return tuple(map(float, numbers))

    def _check_length(self, key: str, numbers: Sequence[float], max_iterations: int) -> None:
        if len(numbers) != max_iterations:
            raise self.error(
                key,
                f"it has {len(numbers)} values for trainer.spin.max_iterations = {max_iterations}; "
                "give one number, or one per iteration",
            )

    def whole_per_iteration(self, key: str, default: int, max_iterations: int) -> tuple[int, ...]:
        """A whole number of at least 1 for all iterations, or a list with one for each."""
        value = self.get(key, default)
        if not _is_list(value):
            return (self.integer(key, default, minimum=1),) * max_iterations
        if not all(_is_integer(number) and number >= 1 for number in value):
            raise self.error(key, "use whole numbers of at least 1")
        self._check_length(key, value, max_iterations)
        return tuple(value)

    def count_or_fraction(self, key: str, default: int | float, *, of: str, minimum: int = 0) -> int | float:
        """An int >= minimum or a float in (0, 1]; -1, NeMo's word for all, becomes 1.0 where that is the default."""
        value = self.get(key, default)
        if value == -1 and default == 1.0 and not isinstance(value, bool):
            return 1.0
        if _is_integer(value) and value >= minimum:
            return value
        if isinstance(value, float) and (0.0 < value <= 1.0 or (value == 0.0 and minimum == 0)):
            return value if value else 0
        raise self.error(key, f"use a number of {of} of at least {minimum}, or a fraction above 0.0 and up to 1.0")

    def text(self, key: str, default: str | None) -> Any:
        value = self.get(key, default)
        if value is not None and (not isinstance(value, str) or not value):
            raise self.error(key, "use a text that is not empty")
        return value

    def path(self, key: str) -> str:
        return self.text(key, _REQUIRED)

    def paths(self, key: str) -> tuple[str, ...]:
        """One path, or a list of at least one."""
        if not _is_list(self.get(key)):
            return (self.path(key),)
        paths = self.strings(key)
        if not paths:
            raise self.error(key, "name at least one file")
        return paths

    def strings(self, key: str) -> tuple[str, ...]:
        value = self.get(key, ())
        if not _is_list(value) or not all(_is_text(text) for text in value):
            raise self.error(key, "use a list of texts that are not empty")
        return tuple(value)

    def mapping(self, key: str) -> Mapping[str, Any]:
        value = self.get(key, {})
        if not isinstance(value, Mapping):
            raise self.error(key, "use a mapping of keys to values")
        return value

    def choice(self, key: str, options: Sequence[str], default: str | None) -> Any:
        value = self.get(key, default)
        for option in options:
            if isinstance(value, str) and value.lower() == option.lower():
                return option
        if value is not None:
            raise self.error(key, "use one of " + ", ".join(options))
        return None

    def path_of(self, key: str) -> str:
        return f"{self.name}.{key}" if self.name else key


def in_words(value: Any) -> str:
    """A value as it stands in YAML: true, null, [1, 2]."""
    words = value if isinstance(value, str) and value.isprintable() and value else json.dumps(value, default=str)
    return words if len(words) <= _SHOWN else f"{words[:_SHOWN]}..."


def shown(value: Any) -> str:
    """A value as Python writes it in ASCII, cut where it is long."""
    words = (
        ascii(value) if not isinstance(value, int) or abs(value) < 2**63 else f"a number of {value.bit_length()} bits"
    )
    return words if len(words) <= _SHOWN else f"{words[:_SHOWN]}..."


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether it is an int or a finite float, and no flag."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)
