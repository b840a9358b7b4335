"""The `.nemo` archive: an uncompressed tar of a directory with model_config.yaml at its root."""

from __future__ import annotations

import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nemo_spin.errors import CheckpointError

CONFIG = "model_config.yaml"
WEIGHTS = "model_weights"


def pack(directory: str | Path, destination: str | Path) -> None:
    """Write the contents of `directory` as a `.nemo` archive.

    The archive is written beside the destination, synced to disk and renamed: it is either whole or not there.
    """
    directory, destination = Path(directory), Path(destination)
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = destination.with_name(f".{destination.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            with tarfile.open(fileobj=file, mode="w:", format=tarfile.GNU_FORMAT) as archive:
                archive.add(directory, arcname=".", filter=_anonymous)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(destination)
    finally:
        partial.unlink(missing_ok=True)
    descriptor = os.open(destination.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def unpack(archive: str | Path, directory: str | Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Extract the members whose name (without a leading "./") is wanted.

    Nothing is written outside `directory`, whatever the archive says. Raises CheckpointError if the file is no tar, is
    truncated, or holds members that would be.
    """
    with _readable(archive) as tar:
        for member in tar:
            if wanted(member.name.removeprefix("./")):
                tar.extract(member, directory, filter="data")


def member_sizes(archive: str | Path) -> dict[str, int]:
    """Name (without a leading "./") and bytes of each file. Raises CheckpointError as `unpack` does."""
    with _readable(archive) as tar:
        return {member.name.removeprefix("./"): member.size for member in tar if member.isfile()}


@contextmanager
def _readable(archive: str | Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(archive, "r:*") as tar:
            yield tar
    except tarfile.FilterError as error:
        raise CheckpointError(f"{archive} holds an unsafe member and is not opened: {error}.") from None
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise CheckpointError(
                f"{archive} cannot be unpacked ({error.strerror}): make room, set TMPDIR to where there is room, or "
                "unpack it yourself and give the directory."
            ) from None
        raise CheckpointError(
            f"{archive} is no .nemo archive, or it is truncated ({error}): copy it again or use another checkpoint."
        ) from None
