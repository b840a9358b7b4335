"""Checkpoints of a run: everything from which it goes on exactly as if it had not stopped.

    checkpoints/
      latest                          the name of the newest whole checkpoint
      iteration-001-step-0000040/     a name for people; the state is inside
        state.json                    progress, metrics, what the run must have in common with its continuation
        shards/                       weights, optimizer, and the reference where it is still needed (torch_dist)
        rollouts/, held_out/          the rollouts of an iteration that is not finished

A checkpoint is written under another name, synced, and renamed: it becomes visible when it is whole. Random state is
not in it because there is none: responses and data order are functions of the seed and the position.

What stays: the newest, the end of every iteration, and the best by a metric.
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

from nemo_spin.checkpoint.sharded import save_sharded
from nemo_spin.errors import CheckpointError
from nemo_spin.progress import Progress

_FORMAT = 1
ROLLOUT_KINDS = ("rollouts", "held_out")


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
    rollout_files: of the iteration under way, by kind: `rollouts` and `held_out`.
    """

    progress: Progress
    identity: dict[str, int | str]
    metrics: dict[str, float] = field(default_factory=dict)
    rollout_files: dict[str, list[Path]] = field(default_factory=dict)


@dataclass(frozen=True)
class Retention:
    """Which checkpoints within an iteration stay beside the newest one.

    top_k: so many of the best by `monitor`, among those that have it; -1 for all. mode: "min" or "max".
    """

    monitor: str = "val_loss"
    mode: str = "min"
    top_k: int = 0

    def rank(self, metrics: dict[Path, dict[str, float]]) -> list[Path]:
        """Checkpoints that have the metric, the best first, of equals the older."""
        sign = 1 if self.mode == "min" else -1
        values = {path: sign * found[self.monitor] for path, found in metrics.items() if self.monitor in found}
        return sorted((path for path, value in values.items() if value == value), key=lambda path: (values[path], path))


class TrainingCheckpoints:
    """The checkpoints of one run directory, visible to all processes. Every process calls every method."""

    def __init__(self, directory: Path, retention: Retention | None = None) -> None:
        self.directory = directory
        self.retention = retention or Retention()

    def best(self) -> tuple[Path, float] | None:
        """The best of the checkpoints that are there, and its metric."""
        metrics = {path: self._read_state(path)["metrics"] for path in self._whole()}
        ranked = self.retention.rank(metrics)
        return (ranked[0], metrics[ranked[0]][self.retention.monitor]) if ranked else None

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
        """Write a checkpoint. keep: it stays for good."""
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
            save_sharded(shards, unfinished / "shards")
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
        under_way = stored["progress"]["iteration_step"] > 0 or any((path / "rollouts").glob("*.parquet"))
        for name, value in stored["identity"].items():
            if identity.get(name) != value and under_way:
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
            {kind: sorted((path / kind).glob("*.parquet")) for kind in ROLLOUT_KINDS},
        )

    def _finish(self, unfinished: Path, name: str, state: RunState, with_reference: bool, keep: bool) -> None:
        for kind, files in state.rollout_files.items():
            (unfinished / kind).mkdir()
            for file in files:
                _link_or_copy(file, unfinished / kind / file.name)
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
        self._remove_all_but(target)

    def _remove_all_but(self, newest: Path) -> None:
        """Keep the newest and what retention asks for."""
        passing = {path: state["metrics"] for path in self._whole() if not (state := self._read_state(path))["keep"]}
        top_k = self.retention.top_k
        staying = list(passing) if top_k == -1 else self.retention.rank(passing)[:top_k]
        for path in passing:
            if path != newest and path not in staying:
                shutil.rmtree(path)

    def _whole(self) -> list[Path]:
        """The checkpoints that are there, oldest first."""
        return sorted(path.parent for path in self.directory.glob("iteration-*/state.json"))

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
