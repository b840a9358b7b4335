"""Reading JSONL, compressed or not, line by line, with an error for people wherever a line cannot be used."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import PathLike
from typing import Any, BinaryIO

import pyarrow as pa

from nemo_spin.errors import DataError

# Told about a record that cannot be read: where it is, and the error.
BadRecord = Callable[[str, DataError], None]

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def _open_zstd(file: BinaryIO) -> BinaryIO:
    return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd"))


# name -> (first bytes of a file, suffix, what reads it)
_COMPRESSIONS: dict[str, tuple[bytes, str, Callable[[BinaryIO], BinaryIO]]] = {
    "gzip": (b"\x1f\x8b", ".gz", lambda file: gzip.GzipFile(fileobj=file)),
    "bzip2": (b"BZh", ".bz2", bz2.BZ2File),
    "xz": (b"\xfd7zXZ\0", ".xz", lzma.LZMAFile),
    "zstandard": (b"\x28\xb5\x2f\xfd", ".zst", _open_zstd),
}
_OTHER_KINDS = {b"PK\x03\x04": "a zip archive", b"ARROW1": "an Arrow file", b"\x93NUMPY": "a NumPy file"}


def read_jsonl(path: str | PathLike[str], on_bad: BadRecord | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, record) for every line that is not blank, reading lazily.

    The file may be compressed with gzip, bzip2, xz or zstandard, which its first bytes tell.
    on_bad: called for a line that is not a JSON object in UTF-8, which is left out then.

    Raises DataError, naming `file:line`, for such a line when there is no `on_bad`, and for a file that is missing, not
    readable, or holds no line.
    """
    found = False
    with _lines(path) as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1:
                line = line.removeprefix(_BYTE_ORDER_MARK)
            if not line.strip():
                continue
            found = True
            where = f"{path}:{number}"
            try:
                record = _parse(line, where)
            except DataError as error:
                if on_bad is None:
                    raise
                on_bad(where, error)
            else:
                yield number, record
    if not found:
        raise DataError(f"data file {path} is empty: it needs one JSON object per line")


@contextmanager
def _lines(path: str | PathLike[str]) -> Iterator[Iterator[bytes]]:
    """The file's lines. Errors of reading, which come while they are consumed, become DataErrors."""
    with _open(path) as file:
        name, reader = _decompressed(file, path)
        yield _reported(reader, path, name)


def _reported(reader: BinaryIO, path: str | PathLike[str], compression: str | None) -> Iterator[bytes]:
    try:
        yield from reader
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if compression is None:
            raise DataError(f"data file {path} cannot be read ({error.strerror}): check the disk") from error
        raise DataError(f"data file {path} is damaged ({compression}: {error}): copy or compress it again") from None


def _decompressed(file: BinaryIO, path: str | PathLike[str]) -> tuple[str | None, BinaryIO]:
    try:
        head = file.read(8)
        file.seek(0)
    except OSError as error:
        raise DataError(f"data file {path} cannot be read ({error.strerror}): check the disk") from error
    for magic, kind in _OTHER_KINDS.items():
        if head.startswith(magic):
            raise DataError(f"data file {path} is {kind}: give JSONL, compressed JSONL or parquet")
    for name, (magic, suffix, reader) in _COMPRESSIONS.items():
        if head.startswith(magic):
            return name, reader(file)
        if head and str(path).endswith(suffix):
            raise DataError(f"data file {path} is not {name}, as its name says: compress it again, or rename it")
    return None, file


def _open(path: str | PathLike[str]) -> BinaryIO:
    try:
        return open(path, "rb")
    except FileNotFoundError:
        raise DataError(f"data file {path} does not exist: check the path") from None
    except IsADirectoryError:
        raise DataError(f"data file {path} is a directory: name a JSONL file in it") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"data file {str(path)!r} cannot be opened ({reason}): check the path and its permissions"
        ) from None


def _parse(line: bytes, where: str) -> dict[str, Any]:
    if b"\0" in line:
        raise DataError(f"{where}: the line holds NUL bytes; the file is damaged or not UTF-8: copy or export it again")
    try:
        record = json.loads(line.rstrip().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 at byte {error.start + 1}: convert the file to UTF-8") from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: not valid JSON at column {error.pos + 1} ({error.msg}): write one JSON object per line"
        ) from None
    except RecursionError:
        raise DataError(f"{where}: JSON nested too deeply: remove or flatten that record") from None
    except ValueError as error:  # an integer with more digits than Python converts
        raise DataError(f"{where}: a JSON value cannot be read ({error}): shorten it") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(record).__name__}: write {{...}} on every line")
    return record
