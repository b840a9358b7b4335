"""What a person reads when a disk does not take a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from nemo_spin.checkpoint import sharded
from nemo_spin.errors import UserError

WORKER = "Worker failure: [Errno 28] No space left on device"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (CheckpointException("write", {0: (RuntimeError(WORKER), None)}), "No space left on device"),
        (CheckpointException("write", {}), "see the messages of the other processes"),
        (OSError(30, "Read-only file system", "f"), "Read-only file system"),
    ],
    ids=["first rank", "another rank", "directory"],
)
def test_it_is_one_sentence(monkeypatch: pytest.MonkeyPatch, error: BaseException, words: str) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(sharded.dist_checkpointing, "save", fail)
    with pytest.raises(UserError, match=words) as refusal:
        sharded.save_sharded({}, Path("checkpoints/x"))
    assert str(refusal.value).startswith("checkpoints/x cannot be written") and "\n" not in str(refusal.value)
