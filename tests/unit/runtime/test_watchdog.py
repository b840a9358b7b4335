"""What ends a run that stands still or has lost a process: real processes that wait for each other, without a model."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nemo_spin.runtime import watchdog
from nemo_spin.runtime.watchdog import LostPeerError, is_lost_peer, summary

REPOSITORY = Path(__file__).resolve().parents[3]

# Three ranks. They wait for each other as GPUs do: in a call that does not notice when a peer is gone.
SCRIPT = """
import os, signal, sys, time
from datetime import timedelta
import torch, torch.distributed as dist
from nemo_spin.runtime import watchdog
from nemo_spin.errors import DataError
from nemo_spin.cli.launch import guarded
from nemo_spin.runtime.watchdog import Watchdog, beat

watchdog._SECONDS_TO_END = 0.5
mode, rank = sys.argv[1], int(os.environ["RANK"])

def wait_for_what_never_comes():
    time.sleep(600)

def main():
    store, _, size = next(dist.rendezvous("env://", timeout=timedelta(seconds=120)))
    dist.init_process_group("gloo", store=dist.PrefixStore("groups", store), rank=rank, world_size=size)
    seconds = 0 if mode == "raise" else 3.0
    with Watchdog(seconds, dist.PrefixStore("nemo_spin", store), rank, size):
        beat("training step 12 of iteration 1")
        dist.barrier()
        print("started", os.getpid(), flush=True)
        if mode == "hang":
            if rank == 2:
                beat("a nap")
                wait_for_what_never_comes()
            dist.all_reduce(torch.ones(1))
        if mode == "raise":
            if rank == 1:
                raise ValueError("a bug") if sys.argv[2] == "bug" else DataError("line 3 is not JSON.")
            wait_for_what_never_comes()
        if mode == "gone":
            if rank == 1:
                os.kill(os.getpid(), signal.SIGSTOP)
            wait_for_what_never_comes()
        if mode == "slow":
            if rank == 1:
                for _ in range(40):
                    time.sleep(0.2)
                    beat()
            dist.barrier()

sys.exit(guarded(main))
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., list[subprocess.Popen]]]:
    processes: list[subprocess.Popen] = []
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    def start(*arguments: str) -> list[subprocess.Popen]:
        port = free_port()
        for rank in range(3):
            environment = os.environ | {
                "PYTHONPATH": str(REPOSITORY),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "3",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            processes.append(
                subprocess.Popen(
                    [sys.executable, str(script), *arguments],
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        return processes

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def outcome(processes: list[subprocess.Popen]) -> tuple[list[int], str]:
    """Exit codes, and what all of them wrote as errors."""
    errors = [process.communicate(timeout=180)[1] for process in processes]
    return [process.returncode for process in processes], "".join(errors)


def test_a_hang_is_told_once_with_the_place_of_every_rank(start: Callable) -> None:
    codes, errors = outcome(start("hang"))
    assert codes == [watchdog.EXIT_CODE] * 3
    assert errors.count("error: no process has made progress for") == 1
    lines = errors.splitlines()
    called = next(n for n, line in enumerate(SCRIPT.splitlines(), start=1) if "dist.all_reduce" in line)
    step = r"  ranks 0, 1 \(training step 12 of iteration 1\): waits in all_reduce at [^ ]*script.py"
    assert any(re.match(rf"{step}:{called} \(main\), from nemo_spin/cli/launch.py:", line) for line in lines), lines
    napping = (
        r"  rank 2 \(a nap\): is at [^ ]*script.py:\d+ \(wait_for_what_never_comes\), from nemo_spin/cli/launch.py:"
    )
    assert any(re.match(napping, line) for line in lines), lines


def test_one_that_works_while_the_others_wait_is_no_hang(start: Callable) -> None:
    assert outcome(start("slow")) == ([0, 0, 0], "")


def test_a_process_that_is_gone_is_named(start: Callable) -> None:
    processes = start("gone")
    errors = [processes[rank].communicate(timeout=180)[1] for rank in (0, 2)]
    assert [processes[rank].returncode for rank in (0, 2)] == [watchdog.EXIT_CODE] * 2
    assert "  rank 1: no sign of life" in "".join(errors)
    processes[1].send_signal(signal.SIGCONT)
    processes[1].communicate(timeout=180)
    assert processes[1].returncode != 0, "and it does not go on alone"


@pytest.mark.parametrize(
    ("kind", "code", "sentence"), [("bug", 1, "ValueError: a bug"), ("mistake", 2, "line 3 is not JSON.")]
)
def test_all_end_with_the_first_that_fails_and_say_which(start: Callable, kind: str, code: int, sentence: str) -> None:
    codes, errors = outcome(start("raise", kind))
    assert codes == [code] * 3
    assert errors.count(f"error: rank 0 ends because rank 1 failed: {sentence}") == 1
    assert errors.count("Traceback") == errors.count(f"error: rank 1: {sentence}\nTraceback") == (kind == "bug")


def test_what_communication_says_of_a_lost_peer_is_not_the_cause() -> None:
    assert is_lost_peer(RuntimeError("[pair.cc:534] Connection closed by peer [127.0.0.1]:1"))
    assert is_lost_peer(RuntimeError("NCCL Error 6: remote process exited"))
    assert not is_lost_peer(RuntimeError("shape mismatch"))
    assert not is_lost_peer(LostPeerError("rank 1 failed"))


def test_ranks_at_the_same_place_stand_together() -> None:
    text = summary(1800, [3], {0: "(x): is at a.py:1", 2: "(x): is at a.py:1", 1: "(x): is at b.py:2"}, 6)
    assert text.splitlines()[1:] == [
        "  ranks 0, 2 (x): is at a.py:1",
        "  rank 1 (x): is at b.py:2",
        "  rank 3: no sign of life, the process has ended or its machine is gone",
        "  ranks 4, 5: no answer",
    ]
