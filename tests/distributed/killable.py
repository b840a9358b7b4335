"""Training runs of four processes that can be killed with SIGKILL, at named points or at any moment, and started again.

Each process of a run is forked from one that has imported everything and holds no thread: a start takes seconds and not
a minute. A run is what `nemo-spin train` makes of a configuration; nothing of it is imitated here.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from run_notes import History, history_of, read_notes
from selfplay import whole_weights
from torch import Tensor

from nemo_spin.config import config_dir

HERE = Path(__file__).resolve().parent
KILLED = -signal.SIGKILL
# Seconds that the others have, after one process was killed, to notice by themselves; then they are killed too, as a
# launcher does.
GRACE = 2.0
PATIENCE = 600.0


@dataclass(frozen=True)
class Layout:
    tp: int = 1
    pp: int = 1
    dp: int = 1

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp


TP2_PP2 = Layout(tp=2, pp=2)
# Of a whole run, and of an epoch.
STEPS, EXAMPLES = 12, 24


@dataclass(frozen=True)
class At:
    """Where to kill: at a named point (`runtime/kill_points.py`), when it is reached the `times`-th time in a start.

    rank: the victim; None for every process that gets there.
    """

    point: str
    times: int = 1
    rank: int | None = None

    @property
    def environment(self) -> dict[str, str]:
        victim = {} if self.rank is None else {"NEMO_SPIN_KILL_RANK": str(self.rank)}
        return {"NEMO_SPIN_KILL_AT": f"{self.point}:{self.times}"} | victim


@dataclass(frozen=True)
class End:
    """How the processes of one start ended.

    codes: by rank, negative for a signal. by_themselves: the ranks that were not ended by the supervisor after another
    had failed. seconds: from the start to the last one's end.
    """

    codes: list[int]
    by_themselves: set[int]
    seconds: float

    @property
    def is_whole(self) -> bool:
        return not any(self.codes)


@dataclass(frozen=True)
class Outcome:
    """weights: of the policy at the end of training. exported: of the `.nemo`."""

    weights: dict[str, Tensor]
    exported: dict[str, Tensor]
    history: History


@functools.cache
def _forking() -> ForkServerContext:
    """What starts processes, by forking one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["noted_run", "pytest"])
    ours = {
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "ARROW_DEFAULT_MEMORY_POOL": "system",  # jemalloc would start a thread, and a thread does not survive a fork
    }
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return context


def _enter(function: str, *args: Any) -> None:
    import noted_run

    getattr(noted_run, function)(*args)


def make_inputs(directory: Path) -> None:
    """Write the SFT model and the data of the runs."""
    process = _forking().Process(target=_enter, args=("make_inputs", str(directory)))
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == 0, (directory / "make_inputs.log").read_text()


class KillableRun:
    """Two iterations of two epochs of three steps, in the directory `run`. Notes, logs and results lie beside it."""

    def __init__(self, directory: Path, inputs: Path, **overrides: Any) -> None:
        directory.mkdir(parents=True)
        self.directory, self.inputs, self.overrides = directory, inputs, overrides
        self.run_dir, self.scratch = directory / "run", directory / "tmp"
        self.scratch.mkdir()
        self.starts = 0

    def start(
        self,
        layout: Layout = TP2_PP2,
        kill: At | None = None,
        meddle: Callable[[list[int]], None] | None = None,
        grace: float = GRACE,
    ) -> End:
        """Start the run, or go on with it, and wait for its end.

        kill: at a named point. meddle: called again and again with the processes' ids, by rank, as long as all of them
        live; may kill them. grace: seconds that the others have when one was killed.
        """
        began = time.monotonic()
        for of_last_start in (*self.directory.glob("*.pt"), *self.directory.glob("phase-*")):
            of_last_start.unlink()
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        environment |= {"TMPDIR": str(self.scratch), **(kill.environment if kill else {})}
        processes = [
            _forking().Process(
                target=_enter,
                args=(
                    "main",
                    rank,
                    layout.world_size,
                    self.starts,
                    environment,
                    self.config(layout),
                    str(self.directory),
                ),
            )
            for rank in range(layout.world_size)
        ]
        self.starts += 1
        for process in processes:
            process.start()
        try:
            by_themselves = _wait(processes, meddle, grace)
        finally:
            for process in processes:
                if process.exitcode is None:  # else another process may have its number by now
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.kill()
                process.join()
        return End([process.exitcode for process in processes], by_themselves, time.monotonic() - began)

    def config(self, layout: Layout) -> dict[str, Any]:
        base = OmegaConf.load(config_dir() / "gpt_spin.yaml")
        for key, value in self.values(layout).items():
            OmegaConf.update(base, key, value)
        return OmegaConf.to_container(base)

    def values(self, layout: Layout) -> dict[str, Any]:
        """The keys of the configuration that are not as shipped."""
        data = str(self.inputs / "train.jsonl")
        return {
            "pretrained_checkpoint.restore_from_path": str(self.inputs / "sft.nemo"),
            "exp_manager.explicit_log_dir": str(self.run_dir),
            "exp_manager.create_tensorboard_logger": False,
            "trainer.accelerator": "cpu",
            "trainer.precision": 32,
            "trainer.devices": layout.world_size,
            "trainer.spin.max_iterations": 2,
            "trainer.spin.max_epochs": 2,
            "trainer.spin.save_interval": 2,
            "trainer.spin.val_check_interval": 3,
            "model.tensor_model_parallel_size": layout.tp,
            "model.pipeline_model_parallel_size": layout.pp,
            "model.micro_batch_size": 2,
            "model.global_batch_size": 8,
            "model.spin.ref_policy_kl_penalty": [0.5, 1.0],
            "model.spin.length_params.max_length": 8,
            "model.spin.held_out_rollouts": 4,
            "model.spin.replay_iterations": 0,
            "model.optim.lr": [1e-3, 5e-4],
            "model.optim.sched.warmup_steps": 2,
            "model.optim.sched.min_lr": 1e-5,
            "model.data.train_ds.file_path": data,
            "model.data.validation_ds.file_path": data,
        } | self.overrides

    def kill(self, at: At, layout: Layout = TP2_PP2) -> None:
        """Start the run and have it killed; raises AssertionError if it was not, or somebody else died before."""
        end = self.start(layout, at)
        victims = [rank for rank, code in enumerate(end.codes) if code == KILLED and rank in end.by_themselves]
        assert victims and at.rank in (None, *victims), f"{at} was not reached: {end}\n{self.log()}"

    def finish(self, layout: Layout = TP2_PP2) -> Outcome:
        """Start the run and let it come to its end."""
        end = self.start(layout)
        assert end.is_whole, f"{end}\n{self.log()}"
        return self.outcome()

    def outcome(self) -> Outcome:
        """What the last start has come to."""
        shards = [torch.load(path) for path in sorted(self.directory.glob("weights-*.pt"))]
        history = history_of(read_notes(self.directory))
        return Outcome(whole_weights(shards), torch.load(self.directory / "exported.pt"), history)

    def log(self, start: int | None = None) -> str:
        """What the processes of a start (by default the last) have printed."""
        start = self.starts - 1 if start is None else start
        return "\n".join(
            f"{path.name}:\n{path.read_text()}" for path in sorted(self.directory.glob(f"start-{start:03d}-*.log"))
        )


def _wait(processes: list[Any], meddle: Callable[[list[int]], None] | None, grace: float) -> set[int]:
    """Until all have ended; the ranks that were not ended from here."""
    deadline = time.monotonic() + PATIENCE
    while (alive := [p for p in processes if p.exitcode is None]) and time.monotonic() < deadline:
        if any(process.exitcode for process in processes):
            deadline = min(deadline, time.monotonic() + grace)
            meddle = None
        if meddle is not None and len(alive) == len(processes):
            meddle([process.pid for process in processes])
        connection.wait([process.sentinel for process in alive], timeout=0.005 if meddle else 0.1)
    return {rank for rank, process in enumerate(processes) if process.exitcode is not None}


def _free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
