"""Checking a value by its declared type and range, and showing values in sentences."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, get_args, get_origin

from nemo_spin.config.settings import Setting

MISSING = "???"  # hydra's mark of a value that has to be given
_SHOWN = 300  # characters of a value in a message


def checked(value: Any, kind: Any, declared: Setting) -> Any:
    """The value as the type `kind`. Raises ValueError that says what to use."""
    if declared.read:
        return declared.read(value)
    if set(get_args(kind)) == {int, float}:
        return _count_or_fraction(value, declared)
    if get_origin(kind) is tuple:
        return _list(value, get_args(kind)[0])
    return _CHECKS[get_origin(kind) or kind](value, declared)


def checked_each(values: Sequence[Any], kind: Any, declared: Setting) -> tuple[Any, ...]:
    """The numbers of a list with one per iteration. Raises ValueError."""
    try:
        return tuple(checked(value, kind, declared) for value in values)
    except ValueError:
        each = "whole numbers of" if kind is int else "finite numbers"
        raise ValueError(f"use {each} {_bounds(declared)}") from None


def is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def is_number(value: Any) -> bool:
    """Whether it is an int or a finite float, and no flag."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def numbers(value: Any) -> tuple[float, ...]:
    """A list of finite numbers. Raises ValueError."""
    if not is_list(value) or not all(map(is_number, value)):
        raise ValueError("use a list of finite numbers")
    return tuple(map(float, value))


def texts(value: Any) -> tuple[str, ...]:
    """A list of texts that are not empty. Raises ValueError."""
    if not is_list(value) or not all(isinstance(text, str) and text for text in value):
        raise ValueError("use a list of texts that are not empty")
    return tuple(value)


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


def _list(value: Any, kind: type) -> tuple[Any, ...]:
    return texts(value) if kind is str else numbers(value)


def _flag(value: Any, declared: Setting) -> bool:
    if not isinstance(value, bool):
        raise ValueError("use true or false")
    return value


def _whole(value: Any, declared: Setting) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not _is_within(value, declared):
        raise ValueError(f"use a whole number of {_bounds(declared)}")
    return value


def _real(value: Any, declared: Setting) -> float:
    if not is_number(value) or not _is_within(value, declared):
        if declared.below is not None:
            raise ValueError(f"use a number from {declared.minimum:g} to below {declared.below:g}")
        raise ValueError(f"use a finite number {_bounds(declared)}")
    return float(value)


def _text(value: Any, declared: Setting) -> str:
    if declared.choices:
        found = [choice for choice in declared.choices if isinstance(value, str) and value.lower() == choice.lower()]
        if not found:
            raise ValueError("use one of " + ", ".join(declared.choices))
        return found[0]
    if not isinstance(value, str) or not value:
        raise ValueError("use a text that is not empty")
    return value


def _mapping(value: Any, declared: Setting) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError("use a mapping of keys to values")
    return value


_CHECKS = {bool: _flag, int: _whole, float: _real, str: _text, Mapping: _mapping}


def _count_or_fraction(value: Any, declared: Setting) -> int | float:
    """An int >= minimum or a float in (0, 1]; -1, NeMo's word for all, becomes 1.0 where that is the default."""
    least = declared.minimum or 0
    if value == -1 and declared.default == 1.0 and not isinstance(value, bool):
        return 1.0
    if isinstance(value, int) and not isinstance(value, bool) and value >= least:
        return value
    if isinstance(value, float) and (0.0 < value <= 1.0 or (value == 0.0 and least == 0)):
        return value if value else 0
    raise ValueError(f"use a number of {declared.counts} of at least {least}, or a fraction above 0.0 and up to 1.0")


def _is_within(value: float, declared: Setting) -> bool:
    return (
        (declared.minimum is None or value >= declared.minimum)
        and (declared.above is None or value > declared.above)
        and (declared.maximum is None or value <= declared.maximum)
        and (declared.below is None or value < declared.below)
    )


def _bounds(declared: Setting) -> str:
    limits = {"at least": declared.minimum, "above": declared.above, "at most": declared.maximum}
    return " and ".join(f"{words} {limit:g}" for words, limit in limits.items() if limit is not None)
