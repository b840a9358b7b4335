"""A crafted checkpoint runs nothing when a run resumes from it, wherever in a pickle the call stands."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from nemo_spin.checkpoint.own_pickles import check_pickles
from nemo_spin.errors import CheckpointError
from nemo_spin.model_io.stores.common_state import FILE

CALL = b"cposix\nsystem\n(S'touch MARK'\ntR"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    directory = tmp_path / "shards"
    state = {"weight": torch.arange(6, dtype=torch.bfloat16).view(2, 3), "number": {"steps": [1, 2]}}
    dcp.save(state, checkpoint_id=str(directory), no_dist=True)
    torch.save({"common": 1}, directory / FILE)
    check_pickles(directory, "iteration-000")
    return directory


@pytest.mark.parametrize(
    "instructions",
    [
        pytest.param(CALL + b"0.", id="its result is dropped"),
        pytest.param(b"0" + CALL + b".", id="in place of all"),
        pytest.param(CALL + b"q\xff0.", id="its result is kept for later, and dropped"),
        pytest.param(
            b"ctorch.distributed.checkpoint.filesystem\nFileSystemReader\n(S'MARK'\ntR0.", id="a class of torch"
        ),
        pytest.param(b"\x8c\x05posix\x8c\x06system\x930.", id="named only, by the newer instruction"),
        pytest.param(b"(S'touch MARK'\niposix\nsystem\n0.", id="by the oldest instruction"),
    ],
)
def test_metadata(shards: Path, instructions: bytes) -> None:
    file = shards / ".metadata"
    file.write_bytes(file.read_bytes()[:-1] + instructions)
    with pytest.raises(
        CheckpointError, match=r"it names (posix\.system|torch\.distributed\.\S+), which does not belong"
    ):
        check_pickles(shards, "iteration-000")


@pytest.mark.parametrize("instructions", [CALL + b"0.", b"0" + CALL + b"."])
@pytest.mark.parametrize("of", ["common state", "object in a shard"])
def test_objects(shards: Path, instructions: bytes, of: str) -> None:
    evil = pickle.dumps({"common": 1}, protocol=2)[:-1] + instructions
    content = io.BytesIO()
    torch.save({"common": 1}, content)
    plain = content.getvalue()
    if of == "common state":
        (shards / FILE).write_bytes(_with_pickle(plain, evil))
    else:
        metadata = dcp.FileSystemReader(shards).read_metadata()
        place = next(place for index, place in metadata.storage_data.items() if index.fqn.startswith("number"))
        file = shards / place.relative_path
        crafted = _with_pickle(plain, evil)
        place.offset, place.length = file.stat().st_size, len(crafted)
        file.write_bytes(file.read_bytes() + crafted)
        (shards / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="is not the plain data that a run writes"):
        check_pickles(shards, "iteration-000")


def _with_pickle(archive: bytes, content: bytes) -> bytes:
    """What torch.save wrote, with another pickle in it."""
    import zipfile

    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(made, "w") as new:
        for name in old.namelist():
            new.writestr(name, content if name.endswith("data.pkl") else old.read(name))
    return made.getvalue()
