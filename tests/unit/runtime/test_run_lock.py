"""One run at a time in a directory; which restart goes on by itself."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_spin.commands import experiment
from nemo_spin.config import ExperimentConfig
from nemo_spin.errors import ConfigError, UserError
from nemo_spin.runtime import run_lock

REPOSITORY = Path(__file__).resolve().parents[3]

HOLDER = """
import sys, time
from pathlib import Path
from nemo_spin.runtime.run_lock import held
with held(Path(sys.argv[1]), print):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, stdout=-1
    )
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.communicate()


def test_the_second_run_is_refused_with_the_names_of_the_first(
    holder: subprocess.Popen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "_SECONDS_TO_WAIT", 1.0)
    said: list[str] = []
    first = f"in use by process {holder.pid} on {socket.gethostname()}"
    with pytest.raises(UserError, match=first), run_lock.held(tmp_path, said.append):
        pytest.fail("both have it")
    assert len(said) == 1 and first in said[0] and "waiting" in said[0]
    assert json.loads((tmp_path / run_lock.FILE_NAME).read_text())["process"] == holder.pid


def test_what_is_killed_lets_go_and_its_successor_waits_for_that(holder: subprocess.Popen, tmp_path: Path) -> None:
    def kill(message: str) -> None:
        assert "waiting" in message
        holder.send_signal(signal.SIGKILL)

    with run_lock.held(tmp_path, kill):
        assert json.loads((tmp_path / run_lock.FILE_NAME).read_text())["process"] == os.getpid()
    with run_lock.held(tmp_path, pytest.fail):
        pass


def test_a_file_system_without_locks_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    said: list[str] = []
    with run_lock.held(tmp_path, said.append):
        assert "without locks" in said[0]


# ------------------------------------------------------------------------------------------ restarts

TORCHRUN = {"TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_RESTART_COUNT": "1"}
SLURM = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}


@pytest.mark.parametrize(
    ("first", "second", "goes_on"),
    [
        (TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "0"}, TORCHRUN, True),
        (TORCHRUN, TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "0"}, True),
        (TORCHRUN | {"TORCHELASTIC_RUN_ID": "none"}, TORCHRUN | {"TORCHELASTIC_RUN_ID": "none"}, True),
        (SLURM | {"SLURM_RESTART_COUNT": ""}, SLURM, True),
        (TORCHRUN | {"TORCHELASTIC_RUN_ID": "b"}, TORCHRUN, False),
        (TORCHRUN, TORCHRUN | {"TORCHELASTIC_MAX_RESTARTS": "0"}, False),
        (SLURM, SLURM | {"SLURM_RESTART_COUNT": "0"}, False),
        ({}, TORCHRUN, False),
        ({}, {}, False),
    ],
    ids=[
        *("torchrun", "torchrun, of another machine", "torchrun without a name", "slurm"),
        *("of another launch", "no restarts", "twice in a job", "of a person", "by hand"),
    ],
)
def test_a_restart_goes_on_with_what_its_own_launch_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: dict[str, str], second: dict[str, str], goes_on: bool
) -> None:
    exp = ExperimentConfig(resume_if_exists=False, resume_ignore_no_checkpoint=False)
    for name in {*TORCHRUN, *SLURM}:
        monkeypatch.delenv(name, raising=False)

    def started_by(environment: dict[str, str]) -> None:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    newest = tmp_path / "checkpoints" / "iteration-000-step-0000002"
    monkeypatch.setattr(experiment.TrainingCheckpoints, "latest", lambda self: newest)
    with monkeypatch.context() as patch:
        for name, value in first.items():
            patch.setenv(name, value)
        with run_lock.held(tmp_path, pytest.fail):
            pass
    started_by(second)
    if goes_on:
        assert experiment.checkpoint_to_resume(exp, tmp_path) == newest
        monkeypatch.setattr(experiment.TrainingCheckpoints, "latest", lambda self: None)
        exp = replace(exp, resume_if_exists=True)
        assert experiment.checkpoint_to_resume(exp, tmp_path) is None, "killed before there was one"
    else:
        with pytest.raises(ConfigError, match="holds the checkpoints of an earlier run"):
            experiment.checkpoint_to_resume(exp, tmp_path)


def test_a_restart_has_more_patience(monkeypatch: pytest.MonkeyPatch, holder: subprocess.Popen, tmp_path: Path) -> None:
    monkeypatch.setattr(run_lock, "_SECONDS_TO_WAIT", 0.0)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with run_lock.held(tmp_path, lambda message: holder.kill()):
        pass
