"""The processes of a run on one machine: torch's launcher starts them, signals go on to them, their end is told."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from signal import SIGINT, SIGKILL, SIGTERM, SIGUSR1, Signals, signal
from typing import Any

import psutil

from nemo_spin.errors import EXIT_CODE

# Set in the processes that are started here.
STARTED_HERE = "NEMO_SPIN_STARTED_BY_LAUNCHER"
# Those that are left when one has failed wait for it in vain: they need no time to save.
_SECONDS_TO_END = 10


class _EndedError(BaseException):
    """A signal came while there was no process to pass it on to."""


def run_distributed(nproc: int, argv: Sequence[str], hide_gpus: bool = False) -> int:
    """Start `nproc` processes of this interpreter on this machine with the arguments `argv`, and wait for them.

    Each gets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. When one fails the others are ended. SIGTERM,
    SIGUSR1 and SIGINT go on to them, and what they make of it is waited for. Returns 0, the exit code of the first that
    failed, or 128 plus the number of the signal that has ended them. The sentence of a UserError is printed once.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _silence_launcher()
    os.environ[STARTED_HERE] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if hide_gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    options: dict[str, Any] = {
        # Those that are passed on here are missing: at one of its own the launcher kills what has not ended in time.
        "signals_to_handle": "SIGHUP,SIGQUIT",
        "shutdown_timeout": _SECONDS_TO_END,
    }
    known = {field.name for field in fields(LaunchConfig)}
    received: list[int] = []
    with tempfile.TemporaryDirectory(prefix="nemo-spin-") as log_dir:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=nproc,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=log_dir),
            **{name: value for name, value in options.items() if name in known},
        )
        try:
            with _signals_passed_on(received):
                elastic_launch(config, sys.executable)(*argv)
        except ChildFailedError as failed:
            return _first_failure(failed, received)
        except _EndedError:
            return 128 + received[-1]
        except SignalException as signalled:
            return 128 + signalled.sigval
        finally:
            del os.environ[STARTED_HERE]
    return 0


@contextmanager
def _signals_passed_on(received: list[int]) -> Iterator[None]:
    """SIGTERM, SIGUSR1 and SIGINT go to the processes started inside: they are in a session of their own, where neither
    a terminal's Ctrl-C nor a signal to the process group reaches them. At the third all are ended by force.

    received: gets their numbers. _EndedError is raised only while there are no processes: in the midst of torch's
    launcher it may get lost.
    """

    def pass_on(signum: int, frame: object) -> None:
        received.append(signum)
        children = psutil.Process().children(recursive=len(received) > 2)
        if not children:
            raise _EndedError
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.send_signal(signum if len(received) <= 2 else SIGKILL)

    before = {number: signal(number, pass_on) for number in (SIGINT, SIGTERM, SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal(number, handler)


def _first_failure(failed: Exception, received: Sequence[int]) -> int:
    """Exit code of the process that failed first; prints what it could not print itself."""
    failures = sorted(failed.failures.items(), key=lambda item: (item[1].timestamp, item[0]))
    for _, failure in failures:
        # Only `launch.guarded` writes such a file; the exit code may be that of a crash at exit.
        if failure.error_file != "<N/A>":
            print(f"error: {failure.message}", file=sys.stderr, flush=True)
            return EXIT_CODE
    if received and any(code in (-received[-1], 128 + received[-1], -SIGKILL) for code in _exit_codes(failures)):
        return 128 + received[-1]
    # those that the launcher ended because of the first
    ended = [item for item in failures if item[1].exitcode in (-SIGTERM, 128 + SIGTERM)]
    rank, failure = next((item for item in failures if item not in ended), failures[0])
    if failure.exitcode < 0:
        name = Signals(-failure.exitcode).name
        hint = ", as the system does when memory runs out" if name == "SIGKILL" else ""
        print(f"error: rank {rank} was ended by {name}{hint}.", file=sys.stderr, flush=True)
        return 128 - failure.exitcode
    return failure.exitcode


def _exit_codes(failures: Sequence[tuple[int, Any]]) -> list[int]:
    return [failure.exitcode for _, failure in failures]


def _silence_launcher() -> None:
    if "LOGLEVEL" in os.environ:
        return
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.elastic", "torch.distributed.launcher")):
            logging.getLogger(name).setLevel(logging.CRITICAL)
