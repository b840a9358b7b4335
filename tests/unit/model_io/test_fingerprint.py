"""A checkpoint is known again where it has moved to, and is not taken for another."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from nemo_spin.errors import CheckpointError
from nemo_spin.model_io.fingerprint import fingerprint


@pytest.mark.parametrize("size", [0, 10, 4096, 4096 * 64, 4096 * 64 + 1, 10**6])
def test_a_file_of_any_size(tmp_path: Path, size: int) -> None:
    path, copy = tmp_path / "a.nemo", tmp_path / "b"
    path.write_bytes(os.urandom(size))
    # within a directory, the names of its files count
    copy.mkdir()
    shutil.copy(path, copy / "c.nemo")
    assert fingerprint(path) == fingerprint(copy / "c.nemo") != fingerprint(copy)
    path.write_bytes(os.urandom(size) if size else b"x")
    assert fingerprint(path) != fingerprint(copy / "c.nemo")


def test_the_last_byte_counts_and_so_does_every_file(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "a").write_bytes(bytes(10**6))
    (tmp_path / "b").write_bytes(b"b")
    first = fingerprint(tmp_path)
    (tmp_path / "weights" / "a").write_bytes(bytes(10**6 - 1) + b"x")
    second = fingerprint(tmp_path)
    (tmp_path / "b").rename(tmp_path / "c")
    assert len({first, second, fingerprint(tmp_path)}) == 3
    with pytest.raises(CheckpointError, match="cannot be read"):
        fingerprint(tmp_path / "none")
