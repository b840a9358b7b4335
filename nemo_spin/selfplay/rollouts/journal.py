"""A journal: responses as they are generated, before they are scored, one line each.

The first line names the origin. A line is a CRC-32 in eight hexadecimal digits, a space, and JSON; a run that is killed
may leave half of the last one. Lines are handed to the operating system at once, but not forced to disk: they outlive
the process, and what a power failure takes is generated again.
"""

from __future__ import annotations

import json
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import asdict
from io import FileIO
from pathlib import Path
from typing import Any

from nemo_spin.generation.interface import Key, Response
from nemo_spin.runtime.kill_points import reached
from nemo_spin.selfplay.rollouts.part import ForeignError, Origin, UnreadableError


class Journal:
    """Writes a journal, which is created with its first response. On an error it is given up: `error` says why."""

    def __init__(self, path: Path, origin: Origin) -> None:
        self.error: OSError | None = None
        self._path, self._origin = path, origin
        self._file: FileIO | None = None

    def append(self, response: Response) -> None:
        """Write a response. Never raises OSError."""
        if self.error is not None:
            return
        try:
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = open(self._path, "wb", buffering=0)  # noqa: SIM115
                self._write(asdict(self._origin))
            self._write(asdict(response) | {"ids": response.ids.tolist()})
        except OSError as error:
            self.error = error
            self.close()
        else:
            reached("rollouts/response")

    def close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            try:
                file.close()
            except OSError as error:
                self.error = self.error or error

    def _write(self, value: dict[str, Any]) -> None:
        text = json.dumps(value).encode()
        rest = memoryview(b"%08x %s\n" % (zlib.crc32(text), text))
        while rest:
            rest = rest[self._file.write(rest) :]


def read_journal(path: Path, origin: Origin) -> dict[Key, Response]:
    """The responses of a journal, up to the first line that is incomplete or damaged.

    Raises UnreadableError if its first line already is, ForeignError if it is of another origin.
    """
    try:
        lines = _whole_lines(path.read_bytes())
        head = next(lines, None)
        if head is None:
            raise UnreadableError
        if head != asdict(origin):
            raise ForeignError
        return {response.key: response for response in map(_response, lines)}
    except (OSError, ValueError, TypeError, KeyError, OverflowError) as error:
        raise UnreadableError from error


def _response(line: dict[str, Any]) -> Response:
    # Journals from before a prompt could have several responses do not number them.
    return Response(line["index"], array("i", line["ids"]), line["finish_reason"], line.get("sample", 0))


def _whole_lines(data: bytes) -> Iterator[dict[str, Any]]:
    for line in data.split(b"\n")[:-1]:
        crc, _, text = line.partition(b" ")
        if crc != b"%08x" % zlib.crc32(text):
            return
        yield json.loads(text)
