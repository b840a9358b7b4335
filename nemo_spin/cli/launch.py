"""Starting a run's processes, or finding out that somebody has, and telling the user once what went wrong in them.

A run's processes come from torchrun, from srun, or from here: `run` starts them with torch's own launcher on a single
machine when nobody else did, each with the command line that this process was started with.
"""

from __future__ import annotations

import errno
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, MutableMapping
from signal import SIG_DFL, SIGINT, signal

from nemo_spin.cli.processes import STARTED_HERE, run_distributed
from nemo_spin.config.schema import ParallelConfig
from nemo_spin.errors import EXIT_CODE, ConfigError, UserError, printable
from nemo_spin.runtime.watchdog import LostPeerError, is_lost_peer

INTERRUPTED = 128 + 2  # what a shell reports of a process that Ctrl-C has ended

# A process that has lost another stays silent until the launcher ends it, so that what remains to be read is the cause;
# only if nothing happens does it speak.
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
    """Call a function and return its exit code: 2 after one sentence for a UserError or a full disk, 130 for Ctrl-C.

    Any other error is raised; in one of several processes it is printed, with the rank above it, and the code is 1.
    """
    if STARTED_HERE in os.environ:
        signal(SIGINT, SIG_DFL)  # the launcher passes Ctrl-C on, and says what there is to say
    try:
        return function() or 0
    except UserError as error:
        _report(error)
        return EXIT_CODE
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            file = error.filename or "A file"
            _report(UserError(f"{file} cannot be written ({error.strerror}): make room, and run again."))
            return EXIT_CODE
        if "RANK" not in os.environ:
            raise
        if isinstance(error, LostPeerError) or is_lost_peer(error):
            time.sleep(_SECONDS_OF_SILENCE)
        if not isinstance(error, LostPeerError):
            first_line = printable((str(error).splitlines() or [""])[0])
            _print_error(f"rank {os.environ['RANK']}: {type(error).__name__}: {first_line}")
            traceback.print_exc()
        elif os.environ.get("LOCAL_RANK", "0") == "0":
            _print_error(f"rank {os.environ['RANK']} ends because {error}")
        return 1


def _print_error(sentence: str) -> None:
    print("error: " + " ".join(sentence.splitlines()), file=sys.stderr, flush=True)


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
    if STARTED_HERE not in os.environ and os.environ.get("LOCAL_RANK", "0") == "0":
        rank = os.environ.get("RANK", "0")
        _print_error(sentence if rank == "0" else f"rank {rank}: {sentence}")


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
