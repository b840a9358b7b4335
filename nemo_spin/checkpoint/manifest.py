"""The list of a checkpoint's files with their sizes and SHA-256, and whether they still are what was written.

It tells a damaged checkpoint from a whole one. It is no signature: who can write the checkpoint can write the list.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Mapping
from itertools import chain
from pathlib import Path, PurePosixPath

import torch.distributed as dist

from nemo_spin.errors import CheckpointError
from nemo_spin.model_io.files import write_json
from nemo_spin.runtime.collectives import gathered, of_first
from nemo_spin.runtime.watchdog import beat

FILE = "manifest.json"
_SHA256 = re.compile("[0-9a-f]{64}")

# The size in bytes, and the SHA-256 in hexadecimal digits.
Digest = tuple[int, str]


def digest_of(path: Path) -> Digest:
    with open(path, "rb") as file:
        beat()
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), sha256


def write_manifest(directory: Path, digests: Mapping[str, Digest]) -> None:
    """digests: by the path within the directory."""
    write_json(directory / FILE, {"files": {name: list(digests[name]) for name in sorted(digests)}})


def read_manifest(directory: Path) -> dict[str, Digest]:
    """Raises CheckpointError, which says what is wrong with it."""
    try:
        files = json.loads((directory / FILE).read_text(encoding="utf-8"))["files"]
        digests = {str(name): (size, sha256) for name, (size, sha256) in files.items()}
    except OSError as error:
        raise CheckpointError(f"{FILE} cannot be read ({error.strerror})") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise CheckpointError(f"{FILE} is damaged") from None
    for name, (size, sha256) in digests.items():
        if not (type(size) is int and isinstance(sha256, str) and _SHA256.fullmatch(sha256) and _is_within(name)):
            raise CheckpointError(f"{FILE} is damaged")
    return digests


def fault_of(directory: Path, name: str, digest: Digest) -> str | None:
    """What is wrong with a file of the list; None for nothing."""
    path = directory / name
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            return f"{name} is no file"
        if found.st_size != digest[0]:
            return f"{name} has {found.st_size} bytes and not {digest[0]}"
        return None if digest_of(path) == digest else f"{name} is not what was written (another SHA-256)"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"


def faults_of(directory: Path) -> list[str]:
    """What is wrong with a checkpoint's files; every process calls it, each reads a share. Empty for nothing."""
    try:
        digests = of_first(lambda: read_manifest(directory))
    except CheckpointError as error:
        return [str(error)]
    by_size = sorted(digests, key=lambda name: (-digests[name][0], name))
    own = by_size[dist.get_rank() :: dist.get_world_size()]
    faults = gathered([fault for name in own if (fault := fault_of(directory, name, digests[name]))])
    return sorted(chain.from_iterable(faults))


def _is_within(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name
