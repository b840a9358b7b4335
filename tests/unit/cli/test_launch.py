from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_spin.cli import launch
from nemo_spin.config.schema import ParallelConfig
from nemo_spin.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[3]

SCRIPT = """
import os, signal, sys, time
from nemo_spin.config.schema import ParallelConfig
from nemo_spin.errors import DataError
from nemo_spin.cli.launch import guarded, run

mode = sys.argv[1]

def check():
    print("checked", flush=True)
    if mode == "refused":
        raise DataError("data.jsonl, line 3: not JSON.")

def work():
    rank = int(os.environ["RANK"])
    if mode == "all_users":
        raise DataError("all of them\\nsay this.")
    if mode == "interrupted":
        print(f"pid {os.getpid()}\\n", end="", flush=True)  # one write: two processes share the pipe
        time.sleep(60)
    if mode == "graceful":
        signals = []
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, lambda signum, frame: signals.append(signum))
        print(f"pid {os.getpid()}\\n", end="", flush=True)  # one write: two processes share the pipe
        while not signals:
            time.sleep(0.01)
        time.sleep(1)
        os.write(1, f"saved after {signals}\\n".encode())
        return
    import torch
    import torch.distributed as dist
    dist.init_process_group("gloo")
    try:
        total = torch.tensor([rank + 1])
        dist.all_reduce(total)
        if rank == 1 and mode == "one_user":
            raise DataError("only rank 1 knows.")
        if rank == 1 and mode == "bug":
            raise ValueError("a bug")
        if rank == 1 and mode == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier()
        # in one write: two processes share this pipe
        os.write(1, f"sum {int(total)} {os.environ['OMP_NUM_THREADS']}\\n".encode())
    finally:
        dist.destroy_process_group()

sys.exit(guarded(lambda: run(ParallelConfig(1, 2, 1, 1, False, "cpu"), work, check)))
"""


@pytest.fixture
def start(tmp_path: Path) -> Callable[[str], subprocess.Popen]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {
        key: value for key, value in os.environ.items() if key not in ("RANK", "OMP_NUM_THREADS", "LOGLEVEL")
    }
    environment |= {"PYTHONPATH": str(REPOSITORY), "TMPDIR": str(tmp_path)}

    def start(mode: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, str(script), mode],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def test_processes_are_started_and_find_each_other(start: Callable, tmp_path: Path) -> None:
    process = start("ok")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert out.splitlines() == ["checked", "sum 3 1", "sum 3 1"]
    assert [path.name for path in tmp_path.iterdir()] == ["script.py"], "nothing is left behind"


@pytest.mark.parametrize(
    ("mode", "sentence"),
    [
        ("refused", "error: data.jsonl, line 3: not JSON.\n"),
        ("all_users", "error: all of them say this.\n"),
        ("one_user", "error: only rank 1 knows.\n"),
    ],
)
def test_a_users_mistake_is_told_once_wherever_it_is_found(start: Callable, mode: str, sentence: str) -> None:
    process = start(mode)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (2, sentence)


def test_a_bug_shows_its_own_traceback_and_not_those_of_its_victims(start: Callable) -> None:
    process = start("bug")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert err.startswith("error: rank 1: ValueError: a bug\nTraceback")
    assert err.count("Traceback") == 1


def test_a_process_that_is_killed_is_named_and_its_victims_are_silent(start: Callable) -> None:
    process = start("killed")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGKILL
    assert err == "error: rank 1 was ended by SIGKILL, as the system does when memory runs out.\n"


def workers_of(process: subprocess.Popen) -> list[int]:
    lines = (process.stdout.readline().split() for _ in range(3))
    return [int(line[1]) for line in lines if line[0] == "pid"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_everything_quietly(start: Callable, number: int) -> None:
    process = start("interrupted")
    workers = workers_of(process)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (128 + number, "")
    assert len(workers) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in workers)


def test_what_processes_make_of_a_signal_is_waited_for(start: Callable) -> None:
    process = start("graceful")
    workers_of(process)
    process.send_signal(signal.SIGUSR1)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert out.splitlines() == ["saved after [10]"] * 2


@pytest.mark.parametrize(
    ("environment", "parallel", "says"),
    [
        ({}, ParallelConfig(2, 1, 1, 1, False, "cpu"), "trainer.num_nodes = 2.* torchrun, or on all with srun"),
        ({"RANK": "0", "WORLD_SIZE": "4"}, ParallelConfig(1, 2, 1, 1, False, "cpu"), "= 2, but 4 processes were star"),
    ],
)
def test_what_was_started_has_to_fit(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], parallel: ParallelConfig, says: str
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ConfigError, match=says):
        launch.run(parallel, lambda: pytest.fail("must not run"))


def test_slurms_variables_become_torchs() -> None:
    step = {"SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_NTASKS": "16", "SLURM_JOB_ID": "123456"}
    adopted = step | {"SLURM_NODELIST": "gpu[007-008,12],login1"}
    launch.adopt_slurm(adopted)
    assert {key: adopted[key] for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")} == {
        "RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16", "MASTER_ADDR": "gpu007", "MASTER_PORT": "23456",
    }  # fmt: skip
    given = step | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1"}
    launch.adopt_slurm(given)
    assert (given["MASTER_ADDR"], given["MASTER_PORT"]) == ("10.0.0.1", "1")
    for left_alone in (step | {"RANK": "0"}, step | {"SLURM_NTASKS": "1"}, step | {"SLURM_JOB_NAME": "interactive"}):
        before = dict(left_alone)
        launch.adopt_slurm(left_alone)
        assert left_alone == before


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [("n1", "n1"), ("a,b", "a"), ("n[1-4]", "n1"), ("n[03,5]-ib,x[1-2]", "n03-ib"), ("a,n[1-2]", "a")],
)
def test_first_host_of_slurms_notation(nodelist: str, host: str) -> None:
    assert launch.first_host(nodelist) == host
