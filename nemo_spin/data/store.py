"""Tokenized examples in an Arrow file: written once, then memory-mapped, so that they take no memory of their own."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from datasets.arrow_writer import ArrowWriter

_IDS = pa.list_(pa.int32())
_COLUMNS = ("prompt_ids", "response_ids", "rejected_ids")
SCHEMA = pa.schema([(name, _IDS) for name in _COLUMNS])
_ROWS_AT_ONCE = 4096
_TOKENS_AT_ONCE = 2**24  # Arrow's offsets have 32 bits


class ExampleWriter:
    """Writes examples to an Arrow file; a context manager that closes it. Raises OSError when it cannot.

    digest: hexadecimal, of the examples in their order, when the file is closed.
    """

    def __init__(self, path: Path) -> None:
        self.digest = ""
        self._hash = hashlib.sha256()
        self._writer = ArrowWriter(schema=SCHEMA, path=str(path))
        self._rows: list[tuple[np.ndarray | None, ...]] = []  # as arrays, because lists of ints take ten times as much
        self._tokens = np.zeros(len(_COLUMNS), np.int64)

    def append(self, prompt_ids: list[int], response_ids: list[int], rejected_ids: list[int] | None) -> None:
        """rejected_ids: None for none."""
        row = (prompt_ids, response_ids, rejected_ids)
        self._rows.append(tuple(None if ids is None else np.array(ids, np.int32) for ids in row))
        self._tokens += [len(ids or ()) for ids in row]
        if len(self._rows) == _ROWS_AT_ONCE or self._tokens.max() >= _TOKENS_AT_ONCE:
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
        columns = [pa.array([row[i] for row in self._rows], type=_IDS) for i in range(len(_COLUMNS))]
        for column in columns:
            for values in (column.offsets, column.is_null(), column.values):
                self._hash.update(values.to_numpy(zero_copy_only=False).tobytes())
        table = pa.Table.from_arrays(columns, schema=SCHEMA)
        self._writer.write_table(table, writer_batch_size=_ROWS_AT_ONCE)
        self._rows, self._tokens = [], np.zeros_like(self._tokens)


class ExampleStore:
    """The examples of an Arrow file that `ExampleWriter` has written, by their number from 0.

    Reading one costs microseconds, and memory only for as long as it is kept: the file is memory-mapped, and the system
    holds as much of it as there is room for.
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError or pyarrow.ArrowException for a file that is missing or damaged."""
        table = Dataset.from_file(str(path)).data.table
        if table.schema.names != list(_COLUMNS):
            raise pa.ArrowInvalid(f"{path} has other columns")
        self._prompts, self._responses, self._rejected = table.columns

    def __len__(self) -> int:
        return len(self._prompts)

    def prompt_and_response(self, index: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Their token ids. index: from 0 to len - 1."""
        return _ids(self._prompts[index]), _ids(self._responses[index])

    def rejected(self, index: int) -> tuple[int, ...] | None:
        """The token ids of a rejected response that came with the data, None where there is none."""
        found = self._rejected[index]
        return _ids(found) if found.is_valid else None

    @property
    def num_rejected(self) -> int:
        """Number of examples that came with a rejected response."""
        return len(self) - self._rejected.null_count

    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """Number of tokens of every prompt and of every response: int32 [len] each."""
        return pc.list_value_length(self._prompts).to_numpy(), pc.list_value_length(self._responses).to_numpy()


def _ids(found: pa.ListScalar) -> tuple[int, ...]:
    return tuple(found.values.to_numpy().tolist())
