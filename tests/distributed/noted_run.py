"""One process of a training run that may be killed at any moment and takes notes of what it does.

It is forked from a process that has imported everything (see `killable.py`), and runs what `nemo-spin train` runs in each
process. The notes are the tests' own, and lie outside the directory of the run.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nemo_spin import faults

NOTES = "notes.jsonl"
_IMPORTED_BY = os.getpid()
_PHASE_BYTES = 64
# What a run does, for the notes: what is under way when a process is killed is the innermost of these.
_PHASES = (
    ("nemo_spin.run", "preflight", "checks"),
    ("nemo_spin.model", "MegatronGPTSPINModel.__init__", "loading the model"),
    ("nemo_spin.trainer", "SPINTrainer.resume", "resuming"),
    ("nemo_spin.trainer", "SPINTrainer.fit", "between steps"),
    ("nemo_spin.trainer", "SPINTrainer.train_step", "training step"),
    ("nemo_spin.trainer", "SPINTrainer.validate", "validation"),
    ("nemo_spin.trainer", "SPINTrainer.save", "saving"),
    ("nemo_spin.model", "MegatronGPTSPINModel.roll_out", "rollouts"),
    ("nemo_spin.model", "MegatronGPTSPINModel.refresh_reference", "reference refresh"),
    ("nemo_spin.run", "export", "export"),
    ("nemo_spin.run", "write_report", "report"),
)


class Notes:
    """What the processes of a run have done in all its starts: a file of JSON lines.

    A line is with the system when `add` returns: SIGKILL loses none.
    """

    def __init__(self, directory: Path, rank: int, start: int) -> None:
        self._file = os.open(directory / NOTES, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._phase_file = os.open(phase_file(directory, rank), os.O_WRONLY | os.O_CREAT)
        self._common = {"start": start, "rank": rank}
        self._phases: list[str] = []

    def add(self, kind: str, **values: Any) -> None:
        line = {"kind": kind, **self._common, "time": time.time(), **values}
        os.write(self._file, (json.dumps(line) + "\n").encode())

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._phases.append(name)
        self._show_phase()
        began = time.monotonic()
        try:
            yield
        finally:
            self.add("phase", name=name, seconds=time.monotonic() - began)
            self._phases.pop()
            self._show_phase()

    def _show_phase(self) -> None:
        name = self._phases[-1] if self._phases else "leaving"
        os.pwrite(self._phase_file, name.encode().ljust(_PHASE_BYTES), 0)


_notes: Notes | None = None
_really_reached = faults.reached


def _reached(point: str) -> None:
    if _notes is not None:
        _notes.add("point", name=point)
    _really_reached(point)


# The package's modules, imported from here on, take the name from there.
faults.reached = _reached

from omegaconf import OmegaConf  # noqa: E402
from runs import make_checkpoint, make_data, shards_of  # noqa: E402

import nemo_spin.run  # noqa: E402
from nemo_spin.commands.train import run_training  # noqa: E402
from nemo_spin.generation.engine import Generator  # noqa: E402
from nemo_spin.megatron import setup  # noqa: E402
from nemo_spin.model import MegatronGPTSPINModel  # noqa: E402
from nemo_spin.trainer import SPINTrainer  # noqa: E402


def phase_file(directory: Path, rank: int) -> Path:
    """Holds the name of what this rank is doing, or did when it was killed."""
    return directory / f"phase-{rank}"


def main(rank: int, world_size: int, start: int, environment: dict[str, str], config: dict[str, Any], out: str) -> None:
    """Train as the configuration says, as one rank of `world_size`; ends as the command does."""
    global _notes
    assert os.getpid() != _IMPORTED_BY, "forked from nothing: this process has imported everything by itself"
    directory = Path(out)
    _write_into(directory / f"start-{start:03d}-rank-{rank}.log")
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    _notes = Notes(directory, rank, start)
    _take_notes(_notes, directory)
    with _notes.phase("starting"):
        run_training(OmegaConf.create(config))


def make_inputs(directory: str) -> None:
    """`sft.nemo` and `train.jsonl`."""
    _write_into(Path(directory) / "make_inputs.log")
    setup.initialize(1, 1, seed=1234)
    make_checkpoint(directory)
    make_data(directory)
    setup.shutdown()


def _write_into(log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, sys.stdout.fileno())
    os.dup2(descriptor, sys.stderr.fileno())


def _take_notes(notes: Notes, directory: Path) -> None:
    is_main = os.environ["RANK"] == "0"
    for module, name, phase in _PHASES:
        _wrap(module, name, functools.partial(_in_phase, notes, phase))

    def train_step(original: Callable, trainer: SPINTrainer, batch: Any) -> dict[str, float]:
        where = {"step": trainer.progress.step + 1, "iteration": trainer.progress.iteration, "epoch": batch.epoch}
        metrics = original(trainer, batch)
        if is_main:
            notes.add("step", **where, indices=[p.example.index for p in batch.pairs], loss=metrics["loss"])
        return metrics

    def fit(original: Callable, trainer: SPINTrainer) -> bool:
        if is_main:
            notes.add("fit", step=trainer.progress.step, iteration=trainer.progress.iteration)
        finished = original(trainer)
        if finished:
            torch.save(shards_of(trainer.model), directory / f"weights-{os.environ['RANK']}.pt")
        return finished

    def generate(original: Callable, self: Generator, requests: Any, iteration: int, *args: Any, **kwargs: Any) -> Any:
        notes.add("requests", iteration=iteration, indices=[request.index for request in requests])
        return original(self, requests, iteration, *args, **kwargs)

    def refresh(original: Callable, model: MegatronGPTSPINModel) -> None:
        original(model)
        if is_main:
            notes.add("refreshed")

    _wrap("nemo_spin.trainer", "SPINTrainer.train_step", train_step)
    _wrap("nemo_spin.trainer", "SPINTrainer.fit", fit)
    _wrap("nemo_spin.generation.engine", "Generator.generate", generate)
    _wrap("nemo_spin.model", "MegatronGPTSPINModel.refresh_reference", refresh)


def _in_phase(notes: Notes, phase: str, original: Callable, *args: Any, **kwargs: Any) -> Any:
    with notes.phase(phase):
        return original(*args, **kwargs)


def _wrap(module: str, name: str, wrapper: Callable) -> None:
    """Call `wrapper(original, ...)` in place of a function or method."""
    owner: Any = sys.modules[module]
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    original = owner.__dict__[last]
    setattr(owner, last, functools.wraps(original)(lambda *args, **kwargs: wrapper(original, *args, **kwargs)))
