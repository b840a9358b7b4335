"""What a configuration may consist of at all: mappings, lists, texts, numbers, flags and null, as deep as people nest.

Checked once, before anything else looks at the values, so that nothing after it meets a text that cannot be printed or
a number that is too large to be shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_spin.config.values import shown
from nemo_spin.errors import ConfigError

MAX_DEPTH = 32
MAX_INTEGER = 2**63 - 1


def check_plain(value: Any, key: str = "") -> None:
    """Raise ConfigError that names the key of what is something else. key: of the value itself."""
    _check(value, key, 0)


def _check(value: Any, key: str, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise _error(key, f"is nested more than {MAX_DEPTH} levels deep: flatten it")
    if isinstance(value, Mapping):
        for name, part in value.items():
            if not _is_name(name):
                raise _error(key, f"has the key {shown(name)}: use a short text of printable characters")
            _check(part, f"{key}.{name}".lstrip("."), depth + 1)
    elif isinstance(value, list | tuple):
        for part in value:
            _check(part, key, depth + 1)
    elif isinstance(value, str):
        _check_text(value, key)
    elif isinstance(value, int):
        if abs(value) > MAX_INTEGER:
            raise _error(key, f"is a number of {value.bit_length()} bits: use one of at most 63")
    elif value is not None and not isinstance(value, float):
        raise _error(key, f"is of the type {type(value).__name__}: use a text, a number, true, false or null")


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and name.isprintable() and 0 < len(name) <= 200 and not name.startswith(".")


def _check_text(text: str, key: str) -> None:
    if "\0" in text:
        raise _error(key, "holds a NUL character: remove it")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise _error(
            key, "holds half of a surrogate pair, or bytes that are not UTF-8: write the characters themselves"
        )


def _error(key: str, says: str) -> ConfigError:
    return ConfigError(f"{key or 'the configuration'} {says}.", key or None)
