"""The `.nemo` archive: an uncompressed tar of a directory with model_config.yaml at its root."""

from __future__ import annotations

import gzip
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from nemo_spin.errors import CheckpointError
from nemo_spin.model_io.files import sync
from nemo_spin.model_io.stores.stacked import MOST_EXPANSION
from nemo_spin.model_io.untrusted.tar_members import (
    Member,
    TruncatedArchiveError,
    UnsafeMemberError,
    read_members,
    starts_archive,
)
from nemo_spin.runtime.watchdog import beat

CONFIG = "model_config.yaml"
WEIGHTS = "model_weights"

# Bytes that the files may have in any case: a toy's weights may all be equal.
ALWAYS_ALLOWED = 256 * 2**20
_PIECE = 2**20
_GZIP = b"\x1f\x8b"


def pack(directory: str | Path, destination: str | Path) -> None:
    """Write the contents of `directory` as a `.nemo` archive.

    The archive is written beside the destination, synced to disk and renamed: it is either whole or not there.
    """
    directory, destination = Path(directory), Path(destination)
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = destination.with_name(f".{destination.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            # What is linked is written as the file that it is: `unpack` refuses links.
            with tarfile.open(fileobj=file, mode="w:", format=tarfile.GNU_FORMAT, dereference=True) as archive:
                archive.add(directory, arcname=".", filter=_anonymous)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(destination)
    finally:
        partial.unlink(missing_ok=True)
    sync(destination.parent)


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    beat()  # the other processes wait meanwhile, for as long as it takes
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def is_archive(path: Path) -> bool:
    """Whether a file is a tar archive, as it is or compressed by gzip, which NeMo's first releases did."""
    try:
        with _decompressed(path) as stream:
            return starts_archive(stream.read(512))
    except (OSError, EOFError, zlib.error):
        return False


def unpack(archive: str | Path, directory: str | Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Extract the files whose name (without a leading "./") is wanted, readable and writable for this user only.

    Nothing is written outside `directory`, whatever the archive says. Raises CheckpointError if the file is no tar, is
    truncated, holds what `tar_members` refuses, or needs more room than there is.
    """
    directory = Path(directory)
    with _readable(archive) as (stream, members):
        directory.mkdir(parents=True, exist_ok=True)
        chosen = [member for member in members if member.is_file and wanted(member.name)]
        _check_room(archive, directory, sum(member.size for member in chosen))
        for member in chosen:
            file = directory / member.name
            file.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
            with open(os.open(file, flags, 0o600), "wb") as opened:
                _copy(stream, member, opened)


def member_sizes(archive: str | Path) -> dict[str, int]:
    """Name (without a leading "./") and bytes of each file. Raises CheckpointError as `unpack` does."""
    with _readable(archive) as (_, members):
        return {member.name: member.size for member in members if member.is_file}


def _copy(stream: BinaryIO, member: Member, target: BinaryIO) -> None:
    stream.seek(member.offset)
    left = member.size
    while left:
        piece = stream.read(min(left, _PIECE))
        if not piece:
            raise TruncatedArchiveError("it ends too early")
        target.write(piece)
        left -= len(piece)


def _check_room(archive: str | Path, directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if needed > free:
        have = f"{directory.parent} has {free / 2**30:.2f} GiB"
        raise _cannot_be_unpacked(archive, f"{needed / 2**30:.2f} GiB are needed, {have}")


def _cannot_be_unpacked(archive: str | Path, reason: str | None) -> CheckpointError:
    return CheckpointError(
        f"{archive} cannot be unpacked ({reason}): make room, set TMPDIR to where there is room, or unpack it yourself "
        "and give the directory."
    )


@contextmanager
def _decompressed(path: str | Path) -> Iterator[BinaryIO]:
    with open(path, "rb") as file:
        if file.read(2) == _GZIP:
            file.seek(0)
            with gzip.GzipFile(fileobj=file) as stream:
                yield stream
        else:
            file.seek(0)
            yield file


@contextmanager
def _readable(archive: str | Path) -> Iterator[tuple[BinaryIO, list[Member]]]:
    try:
        most_bytes = max(MOST_EXPANSION * os.stat(archive).st_size, ALWAYS_ALLOWED)
        with _decompressed(archive) as stream:
            yield stream, read_members(stream, most_bytes)
    except UnsafeMemberError as error:
        raise CheckpointError(f"{archive} holds an unsafe member and is not opened: {error}.") from None
    except (TruncatedArchiveError, EOFError, OSError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise _cannot_be_unpacked(archive, error.strerror) from None
        raise CheckpointError(
            f"{archive} is no .nemo archive, or it is truncated ({error}): copy it again or use another checkpoint."
        ) from None
