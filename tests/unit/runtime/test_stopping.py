"""Signals: noted, not obeyed at once; a second one is obeyed at once. Real signals, in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from signal import SIGINT, SIGTERM, SIGUSR1

import pytest

from nemo_spin.runtime import stopping
from nemo_spin.runtime.stopping import Stopping

REPOSITORY = Path(__file__).resolve().parents[3]


def until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [SIGTERM, SIGUSR1, SIGINT])
def test_a_signal_is_an_answer_to_the_next_question(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(number) for number in stopping.SIGNALS]
    asked = Stopping()
    with asked.signals():
        assert not asked.ask()
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # as a launcher does that passes on what came here as well
        until(asked.ask)
        assert asked.asked and asked.reason == signal.Signals(number).name
    assert [signal.getsignal(number) for number in stopping.SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1
    said = capsys.readouterr().err
    assert said.count(f"{asked.reason}") == 1 and "ends after this step" in said


def test_the_time_is_up_once_it_is() -> None:
    assert not Stopping().ask() and not Stopping(3600).ask()
    assert (late := Stopping(0)).ask()
    assert late.reason == "exp_manager.max_time_per_run is up"


def test_generation_looks_up_now_and_then() -> None:
    late = Stopping(0)
    answers = [late.interrupted() for _ in range(20)]
    assert answers == [False] * 15 + [True] * 5
    assert not any(Stopping(3600).interrupted() for _ in range(100))


def test_what_is_forked_to_write_a_checkpoint_finishes(capsys: pytest.CaptureFixture[str]) -> None:
    asked = Stopping()
    with asked.signals():
        reading, writing = os.pipe()
        if not (child := os.fork()):
            os.write(writing, b"started")
            time.sleep(0.5)
            os._exit(7)
        assert os.read(reading, 7) == b"started"
        os.kill(child, SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert not asked.ask(), "a signal to a child is none to the run"


SECOND = """
import ctypes, os, signal, sys, threading, time
from nemo_spin.runtime import stopping

stopping._SECONDS_OF_ONE_SIGNAL = 0.2
asked = stopping.Stopping()
number = int(sys.argv[1])

def send():
    os.kill(os.getpid(), number)
    time.sleep(1)
    os.kill(os.getpid(), number)

with asked.signals():
    threading.Thread(target=send, daemon=True).start()
    # As a collective does: no Python code runs in the main thread. A signal wakes this one up.
    [ctypes.CDLL(None).sleep(60) for _ in range(3)]
"""


@pytest.mark.parametrize("number", [SIGTERM, SIGINT])
def test_a_second_signal_ends_the_process_wherever_it_waits(number: int) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", SECOND, str(int(number))], env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, timeout=120
    )
    assert ended.returncode == 128 + number


def test_in_another_thread_nothing_is_touched() -> None:
    before = signal.getsignal(SIGTERM)
    seen = []

    def work() -> None:
        with Stopping().signals():
            seen.append(signal.getsignal(SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
