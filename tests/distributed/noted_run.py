"""One process of a training run that may be killed at any moment and takes notes of what it does.

It is forked from a process that has imported everything (see `killable.py`), and runs what `nemo-spin train` runs in
each process. The notes are the tests' own, and lie outside the directory of the run.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from run_notes import Notes

from nemo_spin.runtime import kill_points

_IMPORTED_BY = os.getpid()
# What a run does, for the notes: what is under way when a process is killed is the innermost of these.
_PHASES = (
    ("nemo_spin.commands.train", "preflight", "checks"),
    ("nemo_spin.model", "MegatronGPTSPINModel.__init__", "loading the model"),
    ("nemo_spin.trainer", "SPINTrainer.resume", "resuming"),
    ("nemo_spin.trainer", "SPINTrainer.fit", "between steps"),
    ("nemo_spin.trainer", "SPINTrainer.train_step", "training step"),
    ("nemo_spin.trainer", "SPINTrainer.validate", "validation"),
    ("nemo_spin.trainer", "SPINTrainer.save", "saving"),
    ("nemo_spin.selfplay.megatron_policy", "MegatronPolicy.roll_out", "rollouts"),
    ("nemo_spin.selfplay.megatron_policy", "MegatronPolicy.refresh_reference", "reference refresh"),
    ("nemo_spin.commands.train", "export", "export"),
    ("nemo_spin.commands.train", "write_report", "report"),
)

_notes: Notes | None = None
# The response that the generator has just finished.
_responding: dict[str, Any] = {}
_really_reached = kill_points.reached


def _reached(point: str) -> None:
    if _notes is not None:
        _notes.add("point", name=point)
        if point == "rollouts/response":
            _notes.add("finished", **_responding)
    _really_reached(point)


# The package's modules, imported from here on, take the name from there.
kill_points.reached = _reached

from megatron.core import parallel_state  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402
from runs import make_checkpoint, make_data, shards_of  # noqa: E402

import nemo_spin.commands.train  # noqa: E402, F401
from nemo_spin.cli.train import run_training  # noqa: E402
from nemo_spin.generation.engine import Generator  # noqa: E402
from nemo_spin.megatron import setup  # noqa: E402
from nemo_spin.model_io.open import open_checkpoint  # noqa: E402
from nemo_spin.trainer import SPINTrainer  # noqa: E402


def main(rank: int, world_size: int, start: int, environment: dict[str, str], config: dict[str, Any], out: str) -> None:
    """Train as the configuration says, as one rank of `world_size`; ends as the command does."""
    global _notes
    assert os.getpid() != _IMPORTED_BY, "forked from nothing: this process has imported everything by itself"
    os.setsid()  # what it starts beside itself can be ended with it
    directory = Path(out)
    _write_into(directory / f"start-{start:03d}-rank-{rank}.log")
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    _notes = Notes(directory, rank, start)
    _take_notes(_notes, directory)
    with _notes.phase("starting"):
        run_training(OmegaConf.create(config))
    if rank == 0:
        archive = Path(config["exp_manager"]["explicit_log_dir"]) / "checkpoints" / "megatron_gpt_spin.nemo"
        with open_checkpoint(archive) as source:
            store = source.weights()
            torch.save({name: store.read(name) for name in store.tensors}, directory / "exported.pt")


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
            torch.save(shards_of(trainer.policy), directory / f"weights-{os.environ['RANK']}.pt")
        return finished

    parameters = inspect.signature(Generator.generate)

    def generate(original: Callable, *args: Any, **kwargs: Any) -> Any:
        call = parameters.bind(*args, **kwargs).arguments
        if _speaks_for_its_replica():
            notes.add("asked", iteration=call["iteration"], indices=[request.index for request in call["requests"]])
        if (finished := call.get("finished")) is not None:

            def finished_and_noted(response: Any) -> None:
                global _responding
                _responding = {"iteration": call["iteration"], "indices": [response.index]}
                finished(response)

            call["finished"] = finished_and_noted
        return original(**call)

    _wrap("nemo_spin.trainer", "SPINTrainer.train_step", train_step)
    _wrap("nemo_spin.trainer", "SPINTrainer.fit", fit)
    _wrap("nemo_spin.generation.engine", "Generator.generate", generate)


def _speaks_for_its_replica() -> bool:
    """Whether this is the first of the processes that hold a copy of the model together."""
    return parallel_state.get_tensor_model_parallel_rank() == parallel_state.get_pipeline_model_parallel_rank() == 0


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
