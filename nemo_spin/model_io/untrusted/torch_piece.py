"""What torch.save wrote into a part of a file, looked at before torch.load reads it."""

from __future__ import annotations

import io
import os
import zipfile
from typing import BinaryIO


def check_piece(file: BinaryIO, offset: int, length: int) -> None:
    """Raises ValueError unless it is an archive as torch.save writes it since torch 1.6, with nothing compressed.

    offset, length: of the piece, in bytes. torch.load would take older formats too, among them a tar that it unpacks,
    and makes room for whatever size a compressed part claims.
    """
    try:
        with zipfile.ZipFile(_Piece(file, offset, length)) as archive:
            parts = archive.infolist()
    except zipfile.BadZipFile:
        raise ValueError("it is not what torch.save writes") from None
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts) or sum(p.file_size for p in parts) > length:
        raise ValueError("its parts claim to be larger than it is")


class _Piece(io.RawIOBase):
    """A part of a file as a file of its own, as zipfile needs it; nothing is read ahead."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self._file, self._offset, self._length = file, offset, length
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        if start + position < 0:
            raise OSError("before the begin")  # as files do, and zipfile expects of what is too small
        self._position = start + position
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        wanted = max(min(len(buffer), self._length - self._position), 0)
        self._file.seek(self._offset + self._position)
        found = self._file.read(wanted)
        buffer[: len(found)] = found
        self._position += len(found)
        return len(found)
