"""Starting a run's processes, or finding out that somebody has, and telling the user once what went wrong in them.

A run's processes come from torchrun, from srun, or from here: `run` starts them with torch's own launcher on a single
machine when nobody else did, each with the command line that this process was started with.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from signal import SIGINT, SIGKILL, SIGTERM, Signals, signal

import psutil

from nemo_spin.config.schema import ParallelConfig
from nemo_spin.errors import EXIT_CODE, ConfigError, UserError

INTERRUPTED = 128 + 2  # what a shell reports of a process that Ctrl-C has ended

_STARTED_HERE = "NEMO_SPIN_STARTED_BY_LAUNCHER"
# What communication raises when a peer has failed. Such a process stays silent until the launcher ends it, so that what
# remains to be read is the cause; only if nothing happens does it speak.
_LOST_PEER = re.compile(r"gloo|nccl|connection (closed|reset)|broken pipe", re.IGNORECASE)
_SECONDS_OF_SILENCE = 10.0


def run(parallel: ParallelConfig, work: Callable[[], object], preflight: Callable[[], object] | None = None) -> int:
    """Do `work` in each of a run's processes, starting them if need be. Returns the exit code for this process.

    preflight: the checks with which `work` begins, to be made here once before processes are started.

    Raises ConfigError when processes and configuration do not fit, and what `work` and `preflight` raise.
    """
    adopt_slurm()
    if "RANK" not in os.environ:
        if parallel.num_nodes > 1:
            raise ConfigError(
                f"trainer.num_nodes = {parallel.num_nodes}, but no process was started for this run on other machines: "
                "start it on each of them with torchrun, or on all with srun, one process per device."
            )
        _check_devices(parallel)
        hide_gpus = parallel.accelerator == "cpu" and _cuda_is_available()
        if parallel.world_size > 1 or hide_gpus:
            if preflight is not None:
                preflight()
            return run_distributed(parallel.world_size, sys.orig_argv[1:], hide_gpus)
    else:
        _check_world_size(parallel)
        _check_devices(parallel)
        if parallel.accelerator == "cpu" and _cuda_is_available():
            raise ConfigError(
                "the accelerator is cpu, but the processes see GPUs: start them with an empty CUDA_VISIBLE_DEVICES."
            )
    work()
    return 0


def guarded(function: Callable[[], int | None]) -> int:
    """Call a function and return its exit code: 2 after one sentence for a UserError or a full disk, 130 for Ctrl-C."""
    try:
        return function() or 0
    except UserError as error:
        _report(error)
        return EXIT_CODE
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _report(
            UserError(f"{error.filename or 'A file'} cannot be written ({error.strerror}): make room, and run again.")
        )
        return EXIT_CODE
    except RuntimeError as error:
        if _STARTED_HERE in os.environ and _LOST_PEER.search(str(error)):
            time.sleep(_SECONDS_OF_SILENCE)
        raise


def run_distributed(nproc: int, argv: Sequence[str], hide_gpus: bool = False) -> int:
    """Start `nproc` processes of this interpreter on this machine with the arguments `argv`, and wait for them.

    Each gets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. When one fails the others are ended. Returns 0,
    the exit code of the first that failed, or 130 after Ctrl-C. The sentence of a UserError is printed once.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _silence_launcher()
    os.environ[_STARTED_HERE] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if hide_gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    options = {}
    if "signals_to_handle" in {field.name for field in fields(LaunchConfig)}:
        # Without SIGINT, Ctrl-C reaches this process alone, and the launcher ends the others with SIGTERM, in silence.
        options["signals_to_handle"] = "SIGTERM,SIGHUP,SIGQUIT"
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
            **options,
        )
        try:
            with _interrupt_ends_children() as interrupted:
                elastic_launch(config, sys.executable)(*argv)
        except ChildFailedError as failed:
            return INTERRUPTED if interrupted() else _first_failure(failed)
        except KeyboardInterrupt:
            return INTERRUPTED
        except SignalException as received:
            return 128 + received.sigval
        finally:
            del os.environ[_STARTED_HERE]
    return 0


@contextmanager
def _interrupt_ends_children() -> Iterator[Callable[[], bool]]:
    """Ctrl-C ends the processes started inside, the second time by force; the launcher then finds them gone.

    KeyboardInterrupt is raised only while there are none: in the midst of torch's launcher it may get lost. Yields a
    function that tells whether Ctrl-C has come.
    """
    times = 0

    def end_children(signum: int, frame: object) -> None:
        nonlocal times
        times += 1
        children = psutil.Process().children(recursive=True)
        if not children:
            raise KeyboardInterrupt
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.send_signal(SIGTERM if times == 1 else SIGKILL)

    before = signal(SIGINT, end_children)
    try:
        yield lambda: times > 0
    finally:
        signal(SIGINT, before)


def is_main() -> bool:
    """Whether this is the first of the run's processes, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def adopt_slurm(environment: MutableMapping[str, str] = os.environ) -> None:
    """Give a process that srun started the variables that torch.distributed reads, unless it has them."""
    in_step = {"SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"} <= environment.keys()
    interactive = environment.get("SLURM_JOB_NAME") in ("bash", "interactive")
    if "RANK" in environment or not in_step or interactive or int(environment["SLURM_NTASKS"]) < 2:
        return
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST", "127.0.0.1")
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment["WORLD_SIZE"] = environment["SLURM_NTASKS"]
    environment.setdefault("MASTER_ADDR", first_host(nodes))
    # the same on all machines, and another one for another job
    environment.setdefault("MASTER_PORT", str(20000 + int(environment.get("SLURM_JOB_ID", "0")) % 10000))


def first_host(nodelist: str) -> str:
    """The first name in SLURM's notation: "gpu[07-09,12],login1" begins with "gpu07"."""
    bracketed = re.match(r"([^,\[]*)\[([^\],-]*)[^\]]*\]([^,\[]*)", nodelist)
    return "".join(bracketed.groups()) if bracketed else nodelist.split(",")[0]


def _report(error: UserError) -> None:
    sentence = " ".join(str(error).splitlines())
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file:
        with open(error_file, "w", encoding="utf-8") as file:
            json.dump({"message": sentence, "timestamp": int(time.time())}, file)
    # Not by every process, but by one on each machine: a path may be missing on one of them only.
    if _STARTED_HERE not in os.environ and os.environ.get("LOCAL_RANK", "0") == "0":
        rank = os.environ.get("RANK", "0")
        print("error: " + (f"rank {rank}: " if rank != "0" else "") + sentence, file=sys.stderr, flush=True)


def _first_failure(failed: Exception) -> int:
    """Exit code of the process that failed first; prints what it could not print itself."""
    failures = sorted(failed.failures.items(), key=lambda item: (item[1].timestamp, item[0]))
    for _, failure in failures:
        if failure.error_file != "<N/A>":  # only `_report` writes one; the exit code may be that of a crash at exit
            print(f"error: {failure.message}", file=sys.stderr, flush=True)
            return EXIT_CODE
    # those that the launcher ended because of the first
    ended = [item for item in failures if item[1].exitcode == -SIGTERM]
    rank, failure = next((item for item in failures if item not in ended), failures[0])
    if failure.exitcode < 0:
        name = Signals(-failure.exitcode).name
        hint = ", as the system does when memory runs out" if name == "SIGKILL" else ""
        print(f"error: process {rank} was ended by {name}{hint}.", file=sys.stderr, flush=True)
        return 128 - failure.exitcode
    return failure.exitcode


def _silence_launcher() -> None:
    if "LOGLEVEL" in os.environ:
        return
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.elastic", "torch.distributed.launcher")):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _check_world_size(parallel: ParallelConfig) -> None:
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != parallel.world_size:
        raise ConfigError(
            f"trainer.num_nodes {parallel.num_nodes} x trainer.devices {parallel.devices} = {parallel.world_size}, "
            f"but {started} processes were started: set them to what torchrun or srun starts."
        )


def _check_devices(parallel: ParallelConfig) -> None:
    if parallel.accelerator == "cpu":
        return
    if not _cuda_is_available():
        if parallel.accelerator == "gpu":
            raise ConfigError("the accelerator is gpu, but CUDA finds no GPU: set it to auto or cpu.")
        return
    import torch

    visible = torch.cuda.device_count()
    # a process that srun gave a GPU of its own sees that one only
    if parallel.devices > visible and "RANK" not in os.environ:
        raise ConfigError(
            f"{parallel.devices} processes are to run here, but CUDA finds {visible} GPUs: use at most as many."
        )


def _cuda_is_available() -> bool:
    import torch

    return torch.cuda.is_available()
