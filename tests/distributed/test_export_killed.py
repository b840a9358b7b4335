"""A run that is killed while it writes its result: the same command writes it, whole, and leaves nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from killable import At, KillableRun, Layout, make_inputs

TP2 = Layout(tp=2)
FORMATS = "exp_manager.checkpoint_callback_params"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("inputs")
    make_inputs(directory)
    return directory


def files_of(directory: Path) -> dict[str, int]:
    """Those that are no checkpoint to resume from, with their sizes."""
    found = (path for path in directory.rglob("*") if not path.relative_to(directory).parts[0].startswith("iteration-"))
    return {str(path.relative_to(directory)): path.stat().st_size for path in found if path.is_file()}


def test_the_result_is_written_again_wherever_it_was_killed(inputs: Path, tmp_path: Path) -> None:
    changes = {"trainer.spin.max_steps": 1, f"{FORMATS}.save_hf_on_train_end": True}
    whole = KillableRun(tmp_path / "whole", inputs, **changes)
    expected = whole.finish(TP2)
    killed = KillableRun(tmp_path / "killed", inputs, **changes)
    # The archive comes first, and then the directory: once there is one, it is replaced.
    for point in ("export/begun:1", "export/written:1", "export/published:2", "export/written:2"):
        name, times = point.split(":")
        killed.kill(At(name, int(times), rank=0), TP2)
    found = killed.finish(TP2)
    assert files_of(killed.run_dir / "checkpoints") == files_of(whole.run_dir / "checkpoints")
    assert found.exported.keys() == expected.exported.keys()
    assert all(torch.equal(found.exported[key], expected.exported[key]) for key in expected.exported)
