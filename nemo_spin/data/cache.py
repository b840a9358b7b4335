"""A directory of things that are made once: by one process while the others wait, and visible only when whole."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock

from nemo_spin.errors import DataError

T = TypeVar("T")


class UnusableEntryError(Exception):
    """An entry that is missing, incomplete or damaged: it is made anew."""


def key_of(*parts: Any) -> str:
    """A name for what was made of these values, which JSON has to know: other values give another name."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:40]


def default_cache_dir() -> Path:
    """$XDG_CACHE_HOME/nemo_spin, or ~/.cache/nemo_spin. Raises DataError when the user has no home directory."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nemo_spin"
    except RuntimeError:
        raise DataError(
            "there is no home directory for the tokenized data: set model.data.cache_dir, or XDG_CACHE_HOME"
        ) from None


def open_or_make(
    cache_dir: str | os.PathLike[str] | None, key: str, make: Callable[[Path], None], open_entry: Callable[[Path], T]
) -> T:
    """What `open_entry` makes of the directory `key`, which `make` fills first if it is missing or cannot be used.

    cache_dir: None for `default_cache_dir`. make: given a new directory; what it raises leaves nothing behind.
    open_entry: raises UnusableEntryError for an entry that has to be made anew.

    Raises DataError when the directory cannot be written, and what `make` raises.
    """
    root = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
    entry = root / key
    try:
        return open_entry(entry)  # needs no permission to write, and no lock: an entry is whole or not there
    except UnusableEntryError:
        pass
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{key}.lock"):
            try:
                return open_entry(entry)
            except UnusableEntryError:
                _replace(entry, make)
            return open_entry(entry)
    except (OSError, NotImplementedError) as error:  # the latter from a file system without locks
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"the tokenized data cannot be written to {root} ({reason}): make room there, or set "
            "model.data.cache_dir to a directory that can be written"
        ) from None


def _replace(entry: Path, make: Callable[[Path], None]) -> None:
    unfinished = entry.with_name(f".unfinished-{entry.name}")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed; nobody else has the lock
    try:
        unfinished.mkdir()
        make(unfinished)
        shutil.rmtree(entry, ignore_errors=True)
        unfinished.rename(entry)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
