"""Reading compressed files to their last byte: all that is in them, or an error."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from os import PathLike
from typing import Any, BinaryIO

import pyarrow as pa

from nemo_spin.errors import DataError

# What a reader raises for a damaged file, MemoryError for one that asks for more than there is.
DAMAGE = (EOFError, zlib.error, lzma.LZMAError, OSError, MemoryError)

_CHUNK = 2**16
# xz files say how much memory it takes to read them; `xz -9` asks for 65 MiB.
_XZ_MEMORY = 2**30


class _Streams(io.RawIOBase):
    """The streams of a bzip2 or xz file, one after the other, as parallel compressors write them.

    Python's own readers end without a word where a stream is followed by what is none: the rest of the file would be
    lost. Here it is an error, but for zeros, which are padding.
    """

    def __init__(self, file: BinaryIO, decompressor: Callable[[], Any]) -> None:
        super().__init__()
        self._file, self._decompressor = file, decompressor
        self._stream = decompressor()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            given = b""
            if self._stream.eof:
                given = self._next_stream()
                if not given:
                    return 0
                self._stream = self._decompressor()
            elif self._stream.needs_input:
                given = self._file.read(_CHUNK)
                if not given:
                    raise EOFError("the file ends too early")
            data = self._stream.decompress(given, len(buffer))
            if data:
                buffer[: len(data)] = data
                return len(data)

    def _next_stream(self) -> bytes:
        """The first bytes of what follows the stream that has ended, empty at the end of the file."""
        rest = self._stream.unused_data.lstrip(b"\0")
        while not rest and (chunk := self._file.read(_CHUNK)):
            rest = chunk.lstrip(b"\0")
        return rest


def _open_bzip2(file: BinaryIO) -> BinaryIO:
    return io.BufferedReader(_Streams(file, bz2.BZ2Decompressor))


def _open_xz(file: BinaryIO) -> BinaryIO:
    return io.BufferedReader(_Streams(file, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)))


def _open_zstd(file: BinaryIO) -> BinaryIO:
    return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd"))


# name -> (first bytes of a file, suffix, what reads it)
_COMPRESSIONS: dict[str, tuple[bytes, str, Callable[[BinaryIO], BinaryIO]]] = {
    "gzip": (b"\x1f\x8b", ".gz", lambda file: gzip.GzipFile(fileobj=file)),
    "bzip2": (b"BZh", ".bz2", _open_bzip2),
    "xz": (b"\xfd7zXZ\0", ".xz", _open_xz),
    "zstandard": (b"\x28\xb5\x2f\xfd", ".zst", _open_zstd),
}


def decompressed(file: BinaryIO, head: bytes, path: str | PathLike[str]) -> tuple[str | None, BinaryIO]:
    """(name of the compression, what reads the file), told by its first bytes; None and the file itself for neither.

    What reads it raises one of `DAMAGE` while it is read. Raises DataError where the file's name says otherwise.
    """
    for name, (magic, suffix, reader) in _COMPRESSIONS.items():
        if head.startswith(magic):
            return name, reader(file)
        if head and str(path).endswith(suffix):
            raise DataError(f"data file {path} is not {name}, as its name says: compress it again, or rename it")
    return None, file
