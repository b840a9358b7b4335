"""Reading a JSONL file line by line, with an error for people wherever a line cannot be used."""

from __future__ import annotations

import json
from collections.abc import Iterator
from os import PathLike
from typing import Any, BinaryIO

from nemo_spin.errors import DataError

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_jsonl(path: str | PathLike[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, record) for every line that is not blank, reading lazily.

    Raises DataError, naming `file:line`, for a line that is not a JSON object in UTF-8, and for a file that is missing,
    not readable, or holds no record.
    """
    found = False
    with _open(path) as file:
        try:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix(_BYTE_ORDER_MARK)
                if line.strip():
                    found = True
                    yield number, _parse(line, f"{path}:{number}")
        except OSError as error:
            raise DataError(f"data file {path} cannot be read ({error.strerror}): check the disk") from error
    if not found:
        raise DataError(f"data file {path} is empty: it needs one JSON object per line")


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
