"""Telling whether a checkpoint is the one that it was, wherever it lies now, without reading all of it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from nemo_spin.errors import CheckpointError

_BLOCK = 4096
_BLOCKS_PER_FILE = 64


def fingerprint(path: str | Path) -> str:
    """A hash of the names and sizes of a checkpoint's files, and of blocks of bytes from all over each of them.

    A copy has the same one. A step of training changes every weight, so that other weights have another one, although
    not every byte is looked at. Raises CheckpointError.
    """
    root = Path(path).expanduser()
    digest = hashlib.sha256()
    try:
        files = sorted(file for file in root.rglob("*") if file.is_file()) if root.is_dir() else [root]
        for file in files:
            size = file.stat().st_size
            name = file.relative_to(root).as_posix()
            digest.update(f"{name} {size}\n".encode())
            with open(file, "rb") as opened:
                for place in _places(size):
                    opened.seek(place)
                    digest.update(opened.read(_BLOCK))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): check its permissions.") from None
    return digest.hexdigest()


def _places(size: int) -> list[int]:
    """Where blocks begin: all over a small file, evenly spread over a large one, its end among them."""
    if size <= _BLOCK * _BLOCKS_PER_FILE:
        return list(range(0, size, _BLOCK))
    return [(size - _BLOCK) * number // (_BLOCKS_PER_FILE - 1) for number in range(_BLOCKS_PER_FILE)]
