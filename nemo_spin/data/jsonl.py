"""Reading JSONL, compressed or not, line by line, with an error for people wherever a line cannot be used."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator
from os import PathLike
from reprlib import repr as shortened
from typing import Any, BinaryIO

from nemo_spin.data.compressed import DAMAGE, decompressed
from nemo_spin.errors import DataError, one_line

# Told about a record that cannot be read: where it is, and the error.
BadRecord = Callable[[str, DataError], None]

# A record of more is no example that a model could take; without a limit a small compressed file could fill the memory.
MAX_RECORD_BYTES = 2**26
_CHUNK = 2**20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_OTHER_KINDS = {b"PK\x03\x04": "a zip archive", b"ARROW1": "an Arrow file", b"\x93NUMPY": "a NumPy file"}


def read_jsonl(path: str | PathLike[str], on_bad: BadRecord | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, record) for every line that is not blank, reading lazily.

    The file may be compressed with gzip, bzip2, xz or zstandard, which its first bytes tell.
    on_bad: called for a line that is not a JSON object in UTF-8 of at most `MAX_RECORD_BYTES`, which is left out then.

    Raises DataError, naming `file:line`, for such a line when there is no `on_bad`, and for a file that is missing, not
    readable, or holds no line.
    """
    found = False
    for number, line in enumerate(_lines(path), start=1):
        if number == 1:
            line = line.removeprefix(_BYTE_ORDER_MARK)
        if not line.strip() and len(line) <= MAX_RECORD_BYTES:
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


def check_is_file(path: str | PathLike[str]) -> None:
    """Raise DataError for what is neither a file nor a directory, such as a pipe: it may be read once, or for ever."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return  # whoever opens it says why it cannot be opened
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise DataError(f"data file {path} is not a file but a pipe or a device: write its content to a file")


def _lines(path: str | PathLike[str]) -> Iterator[bytes]:
    """The file's lines with their line breaks. Of one that is too long it yields a byte more than is allowed, and
    leaves out the rest."""
    compression = None
    with _open(path) as file:
        try:
            head = file.read(8)
            file.seek(0)
            for magic, kind in _OTHER_KINDS.items():
                if head.startswith(magic):
                    raise DataError(f"data file {path} is {kind}: give JSONL, compressed JSONL or parquet")
            compression, reader = decompressed(file, head, path)
            while line := reader.readline(MAX_RECORD_BYTES + 1):
                rest = line
                while len(line) > MAX_RECORD_BYTES and rest and not rest.endswith(b"\n"):
                    rest = reader.readline(_CHUNK)
                yield line
        except DAMAGE as error:
            if compression is None:
                reason = getattr(error, "strerror", None) or error
                raise DataError(f"data file {path} cannot be read ({reason}): check the disk") from error
            raise DataError(
                f"data file {path} is damaged ({compression}: {one_line(error)}): copy or compress it again"
            ) from None


def _open(path: str | PathLike[str]) -> BinaryIO:
    check_is_file(path)
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
    if len(line) > MAX_RECORD_BYTES:
        limit = f"{MAX_RECORD_BYTES // 2**20} MiB"
        raise DataError(f"{where}: the line is longer than {limit}: write one record per line, each of at most {limit}")
    if b"\0" in line:
        raise DataError(f"{where}: the line holds NUL bytes; the file is damaged or not UTF-8: copy or export it again")
    try:
        record = json.loads(line.rstrip().decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 at byte {error.start + 1}: convert the file to UTF-8") from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: not valid JSON at column {error.pos + 1} ({error.msg}): write one JSON object per line"
        ) from None
    except _DuplicateKeyError as error:
        raise DataError(
            f"{where}: a key is there twice ({error}), and only one of its values could be used: remove the other"
        ) from None
    except RecursionError:
        raise DataError(f"{where}: JSON nested too deeply: remove or flatten that record") from None
    except ValueError as error:  # an integer with more digits than Python converts
        raise DataError(f"{where}: a JSON value cannot be read ({error}): shorten it") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(record).__name__}: write {{...}} on every line")
    return record


class _DuplicateKeyError(Exception):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; Python's parser would keep the last value of a key, and lose the others without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _DuplicateKeyError(shortened(next(key for key in keys if keys.count(key) > 1)))
    return found
