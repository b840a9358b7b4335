"""A checkpoint's list of files: no bit of it, or of them, changes unseen."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nemo_spin.checkpoint import manifest
from nemo_spin.errors import CheckpointError


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "shards").mkdir()
    (tmp_path / "state.json").write_text('{"step": 40}')
    (tmp_path / "shards" / "__0_0.distcp").write_bytes(bytes(range(256)))
    names = ["state.json", "shards/__0_0.distcp"]
    manifest.write_manifest(tmp_path, {name: manifest.digest_of(tmp_path / name) for name in names})
    return tmp_path


def faults(directory: Path) -> list[str]:
    try:
        digests = manifest.read_manifest(directory)
    except CheckpointError as error:
        return [str(error)]
    found = (manifest.fault_of(directory, name, digest) for name, digest in digests.items())
    return [fault for fault in found if fault]


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "shards/__0_0.distcp"])
def test_every_bit_counts(directory: Path, name: str) -> None:
    assert faults(directory) == []
    content = (directory / name).read_bytes()
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        (directory / name).write_bytes(flipped)
        assert faults(directory), f"bit {bit} of {name}"


def test_what_is_no_file_is_not_read(directory: Path) -> None:
    """A pipe would be waited for, a device never ends."""
    (directory / "state.json").unlink()
    os.mkfifo(directory / "state.json")
    (directory / "shards" / "__0_0.distcp").unlink()
    (directory / "shards" / "__0_0.distcp").symlink_to("/dev/zero")
    assert faults(directory) == ["shards/__0_0.distcp is no file", "state.json is no file"]


@pytest.mark.parametrize("name", ["/etc/hostname", "../outside", "shards/../../outside", "", "a\\u0000b"])
def test_only_files_within_are_listed(directory: Path, name: str) -> None:
    (directory / manifest.FILE).write_text(f'{{"files": {{"{name}": [1, "{"0" * 64}"]}}}}')
    assert faults(directory) == ["manifest.json is damaged"]
