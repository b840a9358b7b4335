"""Reading a data file's records, whatever kind of file it is: JSONL, compressed JSONL, parquet, a saved data set."""

from __future__ import annotations

import os
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from nemo_spin.data.jsonl import BadRecord, check_is_file, read_jsonl
from nemo_spin.data.tables import is_parquet, read_parquet, read_saved
from nemo_spin.errors import DataError


def read_records(path: str | PathLike[str], on_bad: BadRecord | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where it is, record) for every record, reading lazily.

    Where a record is: "file:line" in JSONL, "file: row N" from 1 in parquet and in a directory that
    `datasets.Dataset.save_to_disk` has written. There, a column without a value is left out of the record.
    on_bad: called for a record that cannot be read, which is left out then.

    Raises DataError for such a record when there is no `on_bad`, and for a file that cannot be read or has no record.
    """
    check_is_file(path)
    if os.path.isdir(path):
        yield from read_saved(Path(path), on_bad)
    elif is_parquet(path):
        yield from read_parquet(path, on_bad)
    else:
        for line, record in read_jsonl(path, on_bad):
            yield f"{path}:{line}", record


def place_of(where: str, path: str | PathLike[str]) -> str:
    """A record's place within its file: "line 7" or "row 7"."""
    place = where.removeprefix(f"{path}:").strip()
    return f"line {place}" if place.isdigit() else place


def identity_of(path: str | PathLike[str]) -> list[tuple[str, int, int]]:
    """What changes when a file does: (absolute path, bytes, time of its last change in ns), for each file of it.

    Raises DataError when it is not there, or neither a file nor a directory.
    """
    check_is_file(path)
    try:
        root = Path(path).resolve()
        files = sorted(file for file in root.iterdir() if file.is_file()) if root.is_dir() else [root]
        stats = [(file, file.stat()) for file in files]
    except FileNotFoundError:
        raise DataError(f"data file {path} does not exist: check the path") from None
    except (OSError, ValueError, RuntimeError) as error:  # the last from pathlib, for links that lead in a circle
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"data file {str(path)!r} cannot be opened ({reason}): check the path") from None
    return [(str(file), stat.st_size, stat.st_mtime_ns) for file, stat in stats]
