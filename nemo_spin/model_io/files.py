"""Files that are on disk when a call returns, and room for them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

GIB = 2**30
# What a file system needs beside the tensors: headers, descriptions, whole blocks; and some air for everything else.
_MARGIN_BYTES = 64 * 2**20
_MARGIN_SHARE = 0.01


def sync(path: Path) -> None:
    """Have the system write a file or directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def missing_bytes(directory: Path, num_bytes: int) -> int:
    """How many bytes more a directory's file system needs to take this many, with a margin; 0 where there is room."""
    found = os.statvfs(directory)
    return max(int(num_bytes * (1 + _MARGIN_SHARE)) + _MARGIN_BYTES - found.f_bavail * found.f_frsize, 0)
