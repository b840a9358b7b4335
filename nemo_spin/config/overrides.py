"""Hydra's overrides on a command line, before hydra reads them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from nemo_spin.config.files import config_dir
from nemo_spin.config.keys import KEYS, is_known, unknown


def check_overrides(argv: Iterable[str]) -> None:
    """Refuse overrides of unknown keys, before hydra does so in its own words. Raises ConfigError."""
    for argument in argv:
        key = _key_of(argument)
        section = ""
        for name in key.split(".") if key else ():
            path = f"{section}.{name}".lstrip(".")
            if not is_known(path):
                raise unknown(section, name)
            if path not in KEYS:
                break
            section = path


def addable_overrides(argv: Sequence[str]) -> list[str]:
    """The arguments, with known keys overridden by hydra's ++, which sets a key that the configuration lacks too.

    So the keys of NeMo-Aligner's configuration can be set where ours lacks them, and the other way round, however they
    are written: `key=`, `+key=` or `++key=`. The arguments have passed `check_overrides`.
    """
    return [
        f"++{argument.lstrip('+')}" if _key_of(argument) and not argument.startswith("~") else argument
        for argument in argv
    ]


def with_shipped_configurations(argv: Sequence[str]) -> list[str]:
    """The arguments, with the shipped files where hydra looks for what a file's `defaults` name."""
    if any(argument.lstrip("+").startswith("hydra.searchpath=") for argument in argv):
        return list(argv)
    return [*argv, f"hydra.searchpath=['file://{config_dir()}']"]


def _key_of(argument: str) -> str:
    """The full key that an argument overrides or deletes; "" for options, hydra's own keys, and config groups."""
    key, equals, _ = argument.partition("=")
    key = key.lstrip("+~")
    if argument.startswith("-") or not (equals or argument.startswith("~")):
        return ""
    # a word without dots may be one of hydra's config groups
    if "." not in key or "/" in key or "@" in key or key.startswith("hydra."):
        return ""
    return key
