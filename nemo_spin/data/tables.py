"""Reading tables, row by row: parquet files, and directories that `datasets.Dataset.save_to_disk` has written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

import pyarrow as pa

from nemo_spin.data.jsonl import MAX_RECORD_BYTES, BadRecord, check_is_file
from nemo_spin.errors import DataError, one_line

# (where it is, the record)
Rows = Iterator[tuple[str, dict[str, Any]]]

_PARQUET = b"PAR1"
_ROWS_AT_ONCE = 256
# A row's values that Python has no number, date or text for. ValueError is that of a text that is not UTF-8 as well.
_NO_VALUE = (pa.ArrowException, ValueError, OverflowError, TypeError)


def is_parquet(path: str | PathLike[str]) -> bool:
    """By the file's first bytes. Raises DataError where its name says so, and these do not."""
    try:
        with open(path, "rb") as file:
            head = file.read(len(_PARQUET))
    except (OSError, ValueError):
        return False  # `read_jsonl` says why it cannot be opened
    if head and head != _PARQUET and str(path).endswith(".parquet"):
        raise DataError(f"data file {path} is not parquet, as its name says: write it again, or rename it")
    return head == _PARQUET


def read_parquet(path: str | PathLike[str], on_bad: BadRecord | None) -> Rows:
    """As `records.read_records`."""
    return _rows(path, _parquet_batches(path), on_bad)


def read_saved(path: Path, on_bad: BadRecord | None) -> Rows:
    """As `records.read_records`."""
    return _rows(path, _saved_batches(path), on_bad)


def _parquet_batches(path: str | PathLike[str]) -> Iterator[pa.RecordBatch]:
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=_ROWS_AT_ONCE)
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise DataError(f"data file {path} is damaged (parquet: {one_line(error)}): write it again") from None


def _saved_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """The record batches of the data set's files, whose names are in its `state.json`."""
    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(str(path / split) for split in _splits(path))
        raise DataError(f"{path} holds several splits of a data set: name one of them, {splits or 'a directory in it'}")
    if not (path / "state.json").is_file():
        raise DataError(
            f"data file {path} is a directory, but not one of datasets.save_to_disk: name a file in it, "
            "or several as a list"
        )
    try:
        for name in _file_names(path / "state.json"):
            check_is_file(path / name)
            with pa.memory_map(str(path / name)) as source, pa.ipc.open_stream(source) as stream:
                for batch in stream:
                    batch.validate(full=True)  # Arrow would follow a wrong offset out of the file
                    yield batch
    except (pa.ArrowException, OSError, ValueError, RecursionError, MemoryError) as error:
        raise DataError(f"the data set in {path} is damaged ({one_line(error)}): save it again") from None


def _file_names(state: Path) -> list[str]:
    """Raises OSError, or ValueError when the file says something else."""
    content = json.loads(state.read_text(encoding="utf-8"))
    files = content.get("_data_files") if isinstance(content, dict) else None
    if not isinstance(files, list):
        raise ValueError(f"{state.name} does not name its files")
    names = [file.get("filename") if isinstance(file, dict) else None for file in files]
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{state.name} names {shortened(name)} among its files, which is no file beside it")
    return names


def _splits(path: Path) -> list[str]:
    return sorted(child.name for child in path.iterdir() if (child / "state.json").is_file())


def _rows(path: str | PathLike[str], batches: Iterable[pa.RecordBatch], on_bad: BadRecord | None) -> Rows:
    number = 0
    for batch in batches:
        if not number:
            _check_columns(batch.schema, path)
        for row in range(batch.num_rows):
            number += 1
            where = f"{path}: row {number}"
            try:
                record = _record(batch.slice(row, 1), where)
            except DataError as error:
                if on_bad is None:
                    raise
                on_bad(where, error)
            else:
                yield where, record
    if not number:
        raise DataError(f"data file {path} is empty: it needs at least one row")


def _check_columns(schema: pa.Schema, path: str | PathLike[str]) -> None:
    try:
        names = schema.names
    except UnicodeDecodeError:
        raise DataError(f"data file {path} has a column whose name is not UTF-8: write it again") from None
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"data file {path} has two columns {name!r}, of which one only could be used: remove one")


def _record(row: pa.RecordBatch, where: str) -> dict[str, Any]:
    if row.nbytes > MAX_RECORD_BYTES:
        raise DataError(f"{where}: the row is longer than {MAX_RECORD_BYTES // 2**20} MiB: shorten or remove it")
    try:
        (values,) = row.to_pylist()
    except UnicodeDecodeError:
        raise DataError(f"{where}: a text is not UTF-8: write the file again") from None
    except _NO_VALUE as error:
        raise DataError(
            f"{where}: a value cannot be read ({one_line(error)}): correct it, or leave out its column"
        ) from None
    return {key: value for key, value in values.items() if value is not None}
