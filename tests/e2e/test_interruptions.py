"""Runs that are told to end, lose a process, or stand still: with real processes, started as people start them."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]

MAKE_INPUTS = """
import sys
from nemo_spin.megatron import setup
from runs import make_checkpoint, make_data
setup.initialize(1, 1, seed=1)
print(make_checkpoint(sys.argv[1]))
make_data(sys.argv[1])
"""

# The second rank falls asleep in its third step.
SLEEPER = """
import os, sys, time
from nemo_spin.cli.main import main
if __name__ == "__main__":
    if os.environ.get("RANK") == "1":
        from nemo_spin.selfplay.megatron_policy import MegatronPolicy

        steps = []
        train_step = MegatronPolicy.train_step

        def fall_asleep(*args):
            steps.append(1)
            if len(steps) == 3:
                time.sleep(3600)
            return train_step(*args)

        MegatronPolicy.train_step = fall_asleep
    sys.exit(main())
"""


def start(*command: str, cwd: Path, **environment: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(REPO), str(REPO / "tests" / "distributed")])
    shared = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=cwd,
        env=shared | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("inputs")
    made = start("-c", MAKE_INPUTS, str(directory), cwd=directory)
    _, errors = made.communicate(timeout=600)
    assert made.returncode == 0, errors
    return directory


def overrides(inputs: Path, run_dir: Path) -> list[str]:
    return [
        "train",
        "--config-name=gpt_spin_tiny",
        "trainer.devices=2",
        "model.tensor_model_parallel_size=2",
        f"pretrained_checkpoint.restore_from_path={inputs}/sft.nemo",
        f"model.data.train_ds.file_path={inputs}/train.jsonl",
        "model.data.validation_ds.file_path=null",
        f"exp_manager.explicit_log_dir={run_dir}",
        "exp_manager.create_tensorboard_logger=false",
        "model.spin.length_params.max_length=8",
        "model.global_batch_size=8",
        "model.micro_batch_size=4",
    ]


def test_a_run_that_is_told_to_end_saves_and_ends_well(inputs: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    endless = "trainer.spin.max_epochs=5000"
    run = start("-m", "nemo_spin", *overrides(inputs, run_dir), endless, cwd=tmp_path)
    metrics = run_dir / "metrics.jsonl"
    while not (metrics.is_file() and '"train"' in metrics.read_text()):
        assert run.poll() is None, run.communicate()
        time.sleep(0.1)
    with open(run_dir / "lock" / "holder.json") as lock, pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    run.send_signal(signal.SIGTERM)
    _, errors = run.communicate(timeout=600)
    assert run.returncode == 0, errors
    name = (run_dir / "checkpoints" / "latest").read_text().strip()
    step = json.loads((run_dir / "checkpoints" / name / "state.json").read_text())["progress"]["step"]
    assert errors.count(f"SIGTERM: saved after step {step}. The same command, with") == 1
    assert errors.count("ends after this step, with a checkpoint; a second signal ends it at once") == 1
    assert not list((run_dir / "checkpoints").glob("*.nemo"))


def test_torchrun_starts_a_run_again_that_has_lost_a_rank(inputs: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1")
    run = start(
        *torchrun,
        *("-m", "nemo_spin", *overrides(inputs, run_dir)),
        "trainer.spin.max_steps=2",
        "exp_manager.resume_if_exists=false",
        cwd=tmp_path,
        NEMO_SPIN_KILL_AT="export/begun",
        NEMO_SPIN_KILL_RANK="1",
        NEMO_SPIN_KILL_ONCE=str(tmp_path / "killed"),
    )
    _, errors = run.communicate(timeout=600)
    assert run.returncode == 0, errors
    assert (tmp_path / "killed").exists()
    assert errors.count("Resumed from") == 1
    left = {path.name for path in (run_dir / "checkpoints").iterdir() if not path.name.startswith("iteration-")}
    assert left == {"latest", "megatron_gpt_spin_tiny.nemo"}


def test_a_run_that_stands_still_says_where_and_ends(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    run = start("sleeper.py", *overrides(inputs, tmp_path / "run"), "trainer.spin.hang_timeout=20", cwd=tmp_path)
    _, errors = run.communicate(timeout=600)
    assert run.returncode == 75, errors
    assert errors.count("error: no process has made progress for") == 1
    places = [line for line in errors.splitlines() if line.startswith("  rank ")]
    assert places[0].startswith("  rank 0 (train_step, iteration 0, after step 2): waits in ")
    assert "from nemo_spin/megatron/" in places[0]
    assert places[1].startswith("  rank 1 (train_step, iteration 0, after step 2): is at ")
    assert "(fall_asleep)" in places[1]
