"""Tokenized examples in an Arrow file: written once, then memory-mapped, so that they take no memory of their own."""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_right
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset
from datasets.arrow_writer import ArrowWriter

_IDS = pa.list_(pa.int32())
_COLUMNS = ("prompt_ids", "response_ids", "rejected_ids")
SCHEMA = pa.schema([(name, _IDS) for name in _COLUMNS])
_ROWS_AT_ONCE = 4096
_TOKENS_AT_ONCE = 2**24  # Arrow's offsets have 32 bits


class _Column:
    """Lists of token ids, stored flat until they are written."""

    def __init__(self) -> None:
        self.ids = array("i")
        self.ends = array("i", [0])
        self.missing: list[bool] = []

    def append(self, ids: list[int] | None) -> None:
        self.ids.extend(ids or ())
        self.ends.append(len(self.ids))
        self.missing.append(ids is None)

    def to_arrow(self) -> pa.ListArray:
        ends, ids = np.frombuffer(self.ends, np.int32), np.frombuffer(self.ids, np.int32)
        missing = pa.array(self.missing, pa.bool_())
        return pa.ListArray.from_arrays(pa.array(ends), pa.array(ids), type=_IDS, mask=missing)


class ExampleWriter:
    """Writes examples to an Arrow file; a context manager that closes it. Raises OSError when it cannot.

    digest: hexadecimal, of the examples in their order, when the file is closed.
    """

    def __init__(self, path: Path) -> None:
        self.digest = ""
        self._hash = hashlib.sha256()
        self._writer = ArrowWriter(schema=SCHEMA, path=str(path))
        self._columns = tuple(_Column() for _ in _COLUMNS)

    def append(self, prompt_ids: list[int], response_ids: list[int], rejected_ids: list[int] | None) -> None:
        """rejected_ids: None for none."""
        for column, ids in zip(self._columns, (prompt_ids, response_ids, rejected_ids), strict=True):
            column.append(ids)
        rows, tokens = len(self._columns[0].missing), max(len(column.ids) for column in self._columns)
        if rows == _ROWS_AT_ONCE or tokens >= _TOKENS_AT_ONCE:
            self._flush()

    def __enter__(self) -> ExampleWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._flush()
            self._writer.finalize()
        self._writer.close()
        self.digest = self._hash.hexdigest()

    def _flush(self) -> None:
        for column in self._columns:
            self._hash.update(column.ends.tobytes() + bytes(column.missing) + column.ids.tobytes())
        table = pa.Table.from_arrays([column.to_arrow() for column in self._columns], schema=SCHEMA)
        self._writer.write_table(table, writer_batch_size=_ROWS_AT_ONCE)
        self._columns = tuple(_Column() for _ in _COLUMNS)


class _Lists:
    """One record batch's lists of token ids, as views of the file."""

    def __init__(self, column: pa.ListArray) -> None:
        self.ends = column.offsets.to_numpy()  # int32 [rows + 1]
        self.ids = column.values.to_numpy()
        self.missing = column if column.null_count else None

    def __getitem__(self, row: int) -> tuple[int, ...] | None:
        if self.missing is not None and not self.missing[row].is_valid:
            return None
        return tuple(self.ids[self.ends[row] : self.ends[row + 1]].tolist())


class ExampleStore:
    """The examples of an Arrow file that `ExampleWriter` has written, by their number from 0.

    Reading one costs microseconds, and memory only for as long as it is kept: the file is memory-mapped, and the system
    holds as much of it as there is room for.
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError or pyarrow.ArrowException for a file that is missing or damaged."""
        self._table = Dataset.from_file(str(path)).data.table
        if self._table.schema.names != list(_COLUMNS):
            raise pa.ArrowInvalid(f"{path} has other columns")
        chunks = [self._table.column(name).chunks for name in _COLUMNS]
        self._batches = [tuple(map(_Lists, columns)) for columns in zip(*chunks, strict=True)]
        self._starts = [0]
        for column in chunks[0]:
            self._starts.append(self._starts[-1] + len(column))

    def __len__(self) -> int:
        return self._starts[-1]

    def prompt_and_response(self, index: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Their token ids. index: from 0 to len - 1."""
        batch, row = self._find(index)
        return batch[0][row], batch[1][row]

    def rejected(self, index: int) -> tuple[int, ...] | None:
        """The token ids of a rejected response that came with the data, None where there is none."""
        batch, row = self._find(index)
        return batch[2][row]

    @property
    def num_rejected(self) -> int:
        """Number of examples that came with a rejected response."""
        return len(self) - self._table.column("rejected_ids").null_count

    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """Number of tokens of every prompt and of every response: int32 [len] each."""
        prompt, response = ([np.diff(batch[i].ends) for batch in self._batches] for i in (0, 1))
        nothing = np.zeros(0, np.int32)
        return np.concatenate([nothing, *prompt]), np.concatenate([nothing, *response])

    def _find(self, index: int) -> tuple[tuple[_Lists, ...], int]:
        batch = bisect_right(self._starts, index) - 1
        return self._batches[batch], index - self._starts[batch]
