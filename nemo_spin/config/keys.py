"""Which keys a configuration may have: those that are declared, and those of NeMo-Aligner's table.

A key that is neither is refused: a misspelt one would leave its default in force without a word.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from nemo_spin.config.aligner.table import TABLE
from nemo_spin.config.reading import at
from nemo_spin.config.schema import SpinConfig
from nemo_spin.config.settings import Part, Section, all_parts
from nemo_spin.config.values import in_words, shown
from nemo_spin.errors import ConfigError

DECLARED: dict[str, Part] = {
    part.key: part for part, _ in all_parts(SpinConfig) if not isinstance(part.declared, Section)
}


def _sections() -> dict[str, frozenset[str]]:
    names: dict[str, set[str]] = {}
    for key in DECLARED:
        while key:
            section, _, name = key.rpartition(".")
            names.setdefault(section, set()).add(name)
            key = section
    return {section: frozenset(names[section]) for section in sorted(names)}


# section -> the keys that are read in it
KEYS = _sections()


def is_known(key: str) -> bool:
    """Whether a configuration may have this full key."""
    return key in DECLARED or key in KEYS or (key in TABLE and TABLE[key].is_taken)


def problems(cfg: Mapping[str, Any]) -> Iterator[ConfigError]:
    """What is wrong with the keys of a resolved configuration: those that are unknown, and those of NeMo-Aligner whose
    value asks for what is not done here.
    """
    for section in KEYS:
        node = at(cfg, section) if section else cfg
        if node is not None and not isinstance(node, Mapping):
            yield ConfigError(f"{section} = {shown(node)} must be a mapping of keys to values.", section)
            continue
        for name, value in (node or {}).items():
            key = f"{section}.{name}".lstrip(".")
            if not is_known(key):
                yield unknown(section, name)
            elif key in TABLE and TABLE[key].verdict(value, cfg) == "refused":
                yield ConfigError(f"{key} = {in_words(value)} is not supported, {TABLE[key].reason}: remove it.", key)


def unknown(section: str, key: str) -> ConfigError:
    """The error for a key that a section may not have, with the nearest one that it may."""
    path = f"{section}.{key}".lstrip(".")
    elsewhere = [f"{other}.{key}".lstrip(".") for other in KEYS if key in KEYS[other]]
    # most unknown keys of `model` name a part of the architecture, which is like none of the known ones
    near = get_close_matches(key, KEYS[section], n=1, cutoff=0.7 if section == "model" else 0.5)
    if path in TABLE:
        hint = f"use {TABLE[path].target}"
    elif elsewhere:
        hint = f"did you mean {elsewhere[0]}?"
    elif near:
        hint = f"did you mean {section}.{near[0]}?".replace(" .", " ")
    elif section == "model":
        hint = "the architecture comes from the checkpoint; known are " + ", ".join(sorted(KEYS[section]))
    else:
        hint = "known are " + ", ".join(sorted(KEYS[section]))
    return ConfigError(f"unknown key {path}: {hint}", path)
