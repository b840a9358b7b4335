"""Reading a data file's records, whatever kind of file it is: JSONL, compressed JSONL, parquet, a saved data set."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import pyarrow as pa

from nemo_spin.data.jsonl import BadRecord, read_jsonl
from nemo_spin.errors import DataError

_PARQUET = b"PAR1"
_ROWS_AT_ONCE = 256


def read_records(path: str | PathLike[str], on_bad: BadRecord | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where it is, record) for every record, reading lazily.

    Where a record is: "file:line" in JSONL, "file: row N" from 1 in parquet and in a directory that
    `datasets.Dataset.save_to_disk` has written. There, a column without a value is left out of the record.
    on_bad: called for a record that cannot be read, which is left out then.

    Raises DataError for such a record when there is no `on_bad`, and for a file that cannot be read or has no record.
    """
    if os.path.isdir(path):
        yield from _rows(path, _saved_batches(Path(path)), on_bad)
    elif _is_parquet(path):
        yield from _rows(path, _parquet_batches(path), on_bad)
    else:
        for line, record in read_jsonl(path, on_bad):
            yield f"{path}:{line}", record


def place_of(where: str, path: str | PathLike[str]) -> str:
    """A record's place within its file: "line 7" or "row 7"."""
    place = where.removeprefix(f"{path}:").strip()
    return f"line {place}" if place.isdigit() else place


def identity_of(path: str | PathLike[str]) -> list[tuple[str, int, int]]:
    """What changes when a file does: (absolute path, bytes, time of its last change in ns), for each file of it.

    Raises DataError when it is not there.
    """
    try:
        root = Path(path).resolve()
        files = sorted(file for file in root.iterdir() if file.is_file()) if root.is_dir() else [root]
        stats = [(file, file.stat()) for file in files]
    except FileNotFoundError:
        raise DataError(f"data file {path} does not exist: check the path") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"data file {str(path)!r} cannot be opened ({reason}): check the path") from None
    return [(str(file), stat.st_size, stat.st_mtime_ns) for file, stat in stats]


def _is_parquet(path: str | PathLike[str]) -> bool:
    try:
        with open(path, "rb") as file:
            head = file.read(len(_PARQUET))
    except (OSError, ValueError):
        return False  # `read_jsonl` says why it cannot be opened
    if head and head != _PARQUET and str(path).endswith(".parquet"):
        raise DataError(f"data file {path} is not parquet, as its name says: write it again, or rename it")
    return head == _PARQUET


def _parquet_batches(path: str | PathLike[str]) -> Iterator[pa.RecordBatch]:
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=_ROWS_AT_ONCE)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"data file {path} is damaged (parquet: {_one_line(error)}): write it again") from None


def _saved_batches(path: Path) -> Iterator[pa.RecordBatch]:
    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(str(path / split) for split in _splits(path))
        raise DataError(f"{path} holds several splits of a data set: name one of them, {splits or 'a directory in it'}")
    if not (path / "state.json").is_file():
        raise DataError(
            f"data file {path} is a directory, but not one of datasets.save_to_disk: name a file in it, "
            "or several as a list"
        )
    import datasets

    try:
        saved = datasets.load_from_disk(str(path)).with_format("arrow")
        for table in saved.iter(batch_size=_ROWS_AT_ONCE):
            yield from table.to_batches()
    except IndexError:  # from `datasets`, of a data set without rows, which has no file
        return
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise DataError(f"the data set in {path} is damaged ({_one_line(error)}): save it again") from None


def _splits(path: Path) -> list[str]:
    return sorted(child.name for child in path.iterdir() if (child / "state.json").is_file())


def _rows(
    path: str | PathLike[str], batches: Iterable[pa.RecordBatch], on_bad: BadRecord | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    for batch in batches:
        for row in range(batch.num_rows):
            number += 1
            where = f"{path}: row {number}"
            try:
                (values,) = batch.slice(row, 1).to_pylist()
            except UnicodeDecodeError:
                error = DataError(f"{where}: a text is not UTF-8: write the file again")
                if on_bad is None:
                    raise error from None
                on_bad(where, error)
                continue
            yield where, {key: value for key, value in values.items() if value is not None}
    if not number:
        raise DataError(f"data file {path} is empty: it needs at least one row")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
