"""Checkpoints of a run: everything from which it goes on exactly as if it had not stopped.

    checkpoints/
      latest                          the name of the newest whole checkpoint
      iteration-001-step-0000040/     a name for people; the state is inside
        state.json                    progress, metrics, what the run must have in common with its continuation
        shards/                       weights, optimizer, and the reference where it is still needed (torch_dist)
        rollouts/                     the rollouts of an iteration that is not finished

A checkpoint is written under another name, synced, and renamed: it becomes visible when it is whole. Random state is
not in it because there is none: responses and data order are functions of the seed and the position.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from megatron.core import dist_checkpointing

from nemo_spin.errors import CheckpointError
from nemo_spin.progress import Progress

_FORMAT = 1


class Trainable(Protocol):
    """What a checkpoint needs of the model."""

    @property
    def reference_is_needed(self) -> bool:
        """Whether the reference differs from the policy and rollouts of this iteration are still to be made."""
        ...

    def sharded_training_state(self, with_reference: bool, is_loading: bool) -> dict[str, Any]: ...

    def load_training_state(self, state: dict[str, Any], mid_iteration: bool) -> None: ...


@dataclass
class RunState:
    """What a checkpoint holds beside tensors.

    identity: quantities that a continuation must have in common with the run.
    metrics: of the last step.
    rollout_files: of the iteration under way.
    """

    progress: Progress
    identity: dict[str, int]
    metrics: dict[str, float] = field(default_factory=dict)
    rollout_files: list[Path] = field(default_factory=list)


class TrainingCheckpoints:
    """The checkpoints of one run directory, visible to all processes. Every process calls every method."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def latest(self) -> Path | None:
        """The newest whole checkpoint. Raises CheckpointError if the pointer names one that is not there."""
        pointer = self.directory / "latest"
        if not pointer.is_file():
            return None
        path = self.directory / pointer.read_text(encoding="utf-8").strip()
        if not (path / "state.json").is_file():
            raise CheckpointError(f"{pointer} names {path.name}, which is not a checkpoint in {self.directory}.")
        return path

    def save(self, model: Trainable, state: RunState, keep: bool) -> Path:
        """Write a checkpoint. keep: do not remove it when a newer one has been written."""
        is_main = dist.get_rank() == 0
        name = f"iteration-{state.progress.iteration:03d}-step-{state.progress.step:07d}"
        unfinished = self.directory / f".unfinished-{name}"
        try:
            if is_main:
                shutil.rmtree(unfinished, ignore_errors=True)
                (unfinished / "shards").mkdir(parents=True)
            dist.barrier()
            with_reference = model.reference_is_needed
            shards = model.sharded_training_state(with_reference, is_loading=False)
            dist_checkpointing.save(shards, str(unfinished / "shards"))
            dist.barrier()
            if is_main:
                self._finish(unfinished, name, state, with_reference, keep)
            dist.barrier()
        except BaseException:
            if is_main:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise
        return self.directory / name

    def load(self, path: Path, model: Trainable, identity: dict[str, int]) -> RunState:
        """Restore the model and return the rest. Raises CheckpointError if the checkpoint belongs to another run."""
        stored = self._read_state(path)
        for name, value in stored["identity"].items():
            if identity.get(name) != value and stored["progress"]["iteration_step"] > 0:
                raise CheckpointError(
                    f"{path} was written in the middle of an iteration with {name} = {value}, and this run has "
                    f"{identity.get(name)}: resume with the same, or start in another exp_manager.explicit_log_dir."
                )
        shards = model.sharded_training_state(stored["with_reference"], is_loading=True)
        progress = Progress.from_state_dict(stored["progress"])
        loaded = dist_checkpointing.load(shards, str(path / "shards"))
        model.load_training_state(loaded, mid_iteration=progress.iteration_step > 0)
        return RunState(
            progress,
            stored["identity"],
            stored["metrics"],
            sorted((path / "rollouts").glob("*.parquet")),
        )

    def _finish(self, unfinished: Path, name: str, state: RunState, with_reference: bool, keep: bool) -> None:
        (unfinished / "rollouts").mkdir()
        for file in state.rollout_files:
            _link_or_copy(file, unfinished / "rollouts" / file.name)
        stored = {
            "format": _FORMAT,
            "progress": state.progress.state_dict(),
            "identity": state.identity,
            "metrics": state.metrics,
            "with_reference": with_reference,
            "keep": keep,
        }
        (unfinished / "state.json").write_text(json.dumps(stored, indent=2), encoding="utf-8")
        for file in unfinished.rglob("*"):
            _sync(file)
        target = self.directory / name
        shutil.rmtree(target, ignore_errors=True)
        os.replace(unfinished, target)
        _sync(self.directory)
        pointer = self.directory / "latest.tmp"
        pointer.write_text(name + "\n", encoding="utf-8")
        _sync(pointer)
        os.replace(pointer, self.directory / "latest")
        self._remove_older_than(target)

    def _remove_older_than(self, newest: Path) -> None:
        for path in self.directory.iterdir():
            if path != newest and (path / "state.json").is_file() and not self._read_state(path)["keep"]:
                shutil.rmtree(path)

    def _read_state(self, path: Path) -> dict[str, Any]:
        try:
            stored = json.loads((path / "state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}/state.json cannot be read ({error}): choose another checkpoint.") from None
        if stored.get("format") != _FORMAT:
            raise CheckpointError(f"{path} has format {stored.get('format')}; this version reads format {_FORMAT}.")
        return stored


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _sync(path: Path) -> None:
    """Have the system write a file or directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
