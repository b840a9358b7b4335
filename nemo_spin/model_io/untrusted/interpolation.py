"""OmegaConf's interpolations in a stranger's configuration: `${key}` is looked up, nothing else is.

OmegaConf itself would also call resolvers, `${oc.env:HOME}`, which reach outside the file: the environment, files,
whatever somebody has registered. Here such text stays text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_REFERENCE = re.compile(r"(?<!\\)\$\{(\.*)([A-Za-z_][\w.-]*)\}")
# A reference may lead to another one, and a text may hold several.
_MOST_STEPS = 16
_LONGEST_TEXT = 64 * 1024


def resolve(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy in which `${a.b}` and `${.sibling}` are replaced by the values that they name.

    What names a section or nothing, refers to itself or calls a resolver stays as it is written. `\\${` becomes `${`.
    """
    return _Resolution(config).copy(config, ())


def may_interpolate(value: Any) -> bool:
    """Whether a string in this data is, for OmegaConf, more than text."""
    if isinstance(value, str):
        return "${" in value
    if isinstance(value, Mapping):
        return any(map(may_interpolate, value)) or any(map(may_interpolate, value.values()))
    return isinstance(value, list) and any(map(may_interpolate, value))


def escaped(value: Any) -> Any:
    """Plain data such that OmegaConf, and `resolve`, read every string of it as it is here."""
    if isinstance(value, str):
        return value.replace("${", "\\${")
    if isinstance(value, Mapping):
        return {key: escaped(item) for key, item in value.items()}
    return [escaped(item) for item in value] if isinstance(value, (list, tuple)) else value


class _UnresolvedError(Exception):
    """A reference that stays as it is written."""


class _Resolution:
    """Each text is resolved once, however many others name it: what doubles ten times would else double the work."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        # Keys from the root to a text -> what it is; the text itself while it is being resolved.
        self._done: dict[tuple[Any, ...], Any] = {}

    def copy(self, value: Any, place: tuple[Any, ...]) -> Any:
        if isinstance(value, Mapping):
            return {key: self.copy(item, (*place, key)) for key, item in value.items()}
        if isinstance(value, list):
            return [self.copy(item, (*place, index)) for index, item in enumerate(value)]
        if not isinstance(value, str) or "${" not in value:
            return value
        try:
            found = self._resolved(value, place, _MOST_STEPS)
        except _UnresolvedError:
            return value
        return found.replace("\\${", "${") if isinstance(found, str) else found

    def _resolved(self, text: str, place: tuple[Any, ...], steps: int) -> Any:
        if place not in self._done:
            self._done[place] = _UnresolvedError  # should it lead back to itself
            self._done[place] = self._replaced(text, place, steps)
        if self._done[place] is _UnresolvedError:
            raise _UnresolvedError
        return self._done[place]

    def _replaced(self, text: str, place: tuple[Any, ...], steps: int) -> Any:
        if whole := _REFERENCE.fullmatch(text):
            return self._named(whole, place, steps)
        made = _REFERENCE.sub(lambda found: str(self._named(found, place, steps)), text)
        if len(made) > _LONGEST_TEXT:
            raise _UnresolvedError
        return made

    def _named(self, reference: re.Match[str], place: tuple[Any, ...], steps: int) -> Any:
        dots = len(reference[1])
        target = (*(place[: max(len(place) - dots, 0)] if dots else ()), *reference[2].split("."))
        value: Any = self._config
        for key in target:
            if not (isinstance(value, Mapping) and key in value) and not (isinstance(value, list) and type(key) is int):
                raise _UnresolvedError
            value = value[key]
        if isinstance(value, (Mapping, list)) or steps == 0:
            raise _UnresolvedError
        return self._resolved(value, target, steps - 1) if isinstance(value, str) else value
