"""One run at a time in a directory, and which launch began it.

The lock is flock's: the system frees it when its holder ends, however it ends. What stands in the file is for people,
and for a process that a launcher has started again, which may go on with what its predecessor began.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from nemo_spin.errors import UserError

# In a directory of its own: exp_manager moves the files of an earlier run out of the way.
FILE_NAME = "lock/holder.json"
# A predecessor that is about to end, or whose machine was lost: NFS frees the locks of a client after 90 seconds.
_SECONDS_TO_WAIT = 15.0
_SECONDS_TO_WAIT_AFTER_RESTART = 120.0
_SECONDS_BETWEEN_TRIES = 0.5
_NOT_SUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


@contextmanager
def held(run_dir: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Around all that a run writes: the directory is this process's. say: told what a user should know.

    Raises UserError that names the holder where another run has it, and does not end within some seconds.
    """
    file = run_dir / FILE_NAME
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _lock(descriptor, run_dir, say)
        holder = {"host": socket.gethostname(), "process": os.getpid(), "launch": launch()}
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, run_dir: Path, say: Callable[[str], None]) -> None:
    patience = _SECONDS_TO_WAIT_AFTER_RESTART if restarts() else _SECONDS_TO_WAIT
    tries = round(patience / _SECONDS_BETWEEN_TRIES)
    for attempt in range(tries + 1):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno in _NOT_SUPPORTED:
                say(f"note: {run_dir} is on a file system without locks: nothing keeps a second run out of it.")
                return
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
        if attempt == 0:
            say(f"{run_dir} is in use by {_holder(run_dir)}: waiting up to {patience:.0f} s for it to end.")
        time.sleep(_SECONDS_BETWEEN_TRIES)
    raise UserError(
        f"{run_dir} is in use by {_holder(run_dir)}: end that run, or choose another exp_manager.explicit_log_dir."
    )


def _holder(run_dir: Path) -> str:
    holder = _read(run_dir)
    return f"process {holder['process']} on {holder['host']}" if "process" in holder else "another run"


def _read(run_dir: Path) -> dict[str, object]:
    try:
        holder = json.loads((run_dir / FILE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


# ------------------------------------------------------------------------------------------ restarts


def restarts(environment: Mapping[str, str] = os.environ) -> int:
    """How often torchrun (`--max-restarts`) or Slurm (requeue) have started this again."""
    counts = (environment.get(name, "") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    return sum(int(count) for count in counts if count.isdecimal())


def launch(environment: Mapping[str, str] = os.environ) -> str | None:
    """What stays the same when a launcher starts it again, and is another for another launch; None if it would not."""
    if job := environment.get("SLURM_JOB_ID"):
        return f"slurm {job}"
    run_id = environment.get("TORCHELASTIC_RUN_ID")
    if run_id is None or environment.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        return None
    # torchrun calls every launch "none" that was not given a name: then it is the launcher's own process.
    return f"torchelastic {socket.gethostname()} {os.getppid()}" if run_id == "none" else f"torchelastic {run_id}"


def was_begun_by_this_launch(run_dir: Path) -> bool:
    """Whether this is a restart of what wrote into the directory last: it goes on without being told to.

    The counts of restarts alone do not say so: a first attempt may have been refused because of what an earlier run had
    left, and torchrun's is that of one machine, where another one's processes may have been the ones to fail.
    """
    if "SLURM_JOB_ID" in os.environ and not restarts():
        return False  # a person may start several runs in a job
    return launch() is not None and _read(run_dir).get("launch") == launch()
