"""The points at which tests kill a run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
from nemo_spin.runtime.kill_points import reached
for step in range(3):
    reached("train/step")
    print(step, flush=True)
"""


@pytest.mark.parametrize(
    ("environment", "lived"),
    [
        ({}, "012"),
        ({"NEMO_SPIN_KILL_AT": "train/step"}, ""),
        ({"NEMO_SPIN_KILL_AT": "train/step:3"}, "01"),
        ({"NEMO_SPIN_KILL_AT": "validation"}, "012"),
        ({"NEMO_SPIN_KILL_AT": "train/step", "NEMO_SPIN_KILL_RANK": "1"}, "012"),
        ({"NEMO_SPIN_KILL_AT": "train/step", "NEMO_SPIN_KILL_RANK": "1", "RANK": "1"}, ""),
    ],
)
def test_a_process_is_killed_where_it_is_asked_for(environment: dict[str, str], lived: str) -> None:
    ended = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert ended.stdout.split() == list(lived)
    assert ended.returncode == (0 if lived == "012" else -9)


def test_a_process_is_killed_once(tmp_path: Path) -> None:
    environment = {"NEMO_SPIN_KILL_AT": "train/step", "NEMO_SPIN_KILL_ONCE": str(tmp_path / "killed")}
    codes = [subprocess.run([sys.executable, "-c", SCRIPT], env=environment).returncode for _ in range(2)]
    assert codes == [-9, 0]
