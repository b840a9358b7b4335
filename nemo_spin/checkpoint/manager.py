"""Checkpoints of a run: everything from which it goes on exactly as if it had not stopped.

    checkpoints/
      latest                          the name of the newest checkpoint, for people and scripts
      iteration-001-step-0000040/     a name for people; the state is inside
        manifest.json                 every file with its size and SHA-256
        state.json                    progress, metrics, what the run must have in common with its continuation
        shards/                       weights, optimizer, and the reference where it is still needed (torch_dist)
        rollouts/, held_out/          the rollouts of an iteration that is not finished
        replay-000/, earlier-000/     what it replays of iteration 0, scored anew and as it was made

A checkpoint is written under another name, in the background, from a copy in host memory; it becomes visible when it is
whole. It is read again, and compared with its manifest, before a run goes on from it. Random state is not in it because
there is none: responses and data order are functions of the seed and the position.

What stays: the newest, the end of every iteration, and the best by a metric. A disk that takes no checkpoint does not
end the run.
"""

from __future__ import annotations

import copy
import errno
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from megatron.core import dist_checkpointing

from nemo_spin.checkpoint import publishing
from nemo_spin.checkpoint.background import Outcome, Part, Retries, Saving
from nemo_spin.checkpoint.manifest import faults_of, read_manifest
from nemo_spin.checkpoint.own_pickles import check_pickles
from nemo_spin.checkpoint.retention import Retention
from nemo_spin.checkpoint.run_state import RunState, Stored, pointed_at, stored_in
from nemo_spin.config import CheckpointConfig
from nemo_spin.errors import CheckpointError, UserError
from nemo_spin.model_io.files import GIB, missing_bytes
from nemo_spin.model_io.stores.sharded import plan_shards
from nemo_spin.runtime.collectives import everywhere, of_first, total
from nemo_spin.runtime.kill_points import reached

# After an error: how long the processes that are left wait for a checkpoint on its way.
_SECONDS_AFTER_ERROR = 60.0


class Trainable(Protocol):
    """What a checkpoint needs of the model."""

    @property
    def reference_is_needed(self) -> bool:
        """Whether the reference differs from the policy and rollouts of this iteration are still to be made."""
        ...

    def sharded_training_state(self, with_reference: bool, is_loading: bool) -> dict[str, Any]: ...

    def load_training_state(self, state: dict[str, Any], mid_iteration: bool) -> None: ...


class TrainingCheckpoints:
    """The checkpoints of one run directory, visible to all processes.

    `latest` only looks. Every process calls each of the other methods, at the same point of the run.
    """

    def __init__(
        self,
        directory: Path,
        options: CheckpointConfig | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        """options: what stays, and whether `save` waits for the disk; None to look only. say: tells people."""
        self.directory = directory
        self._retention = Retention(options.monitor, options.mode, options.save_top_k) if options else Retention()
        self._asynchronous = options is None or options.async_save
        self._say = say
        self._saving: Saving | None = None
        self._retries = Retries()
        self._newest: Path | None = None
        self._num_bytes = 0  # of the last checkpoint, on all ranks

    # ------------------------------------------------------------------------------------------ looking

    def latest(self) -> Path | None:
        """The newest checkpoint by its state; the pointer may be older. None of its other files is looked at.

        Raises CheckpointError if there is none and the pointer names one.
        """
        stored, faults = stored_in(self.directory)
        newest = next((s.path for s in stored), next(iter(faults), None))
        if newest is None and (name := pointed_at(self.directory)):
            raise CheckpointError(
                f"{self.directory}/latest names {name!r}, but there is no checkpoint beside it: bring it back, or "
                "remove that file to start the run anew."
            )
        return newest

    # ------------------------------------------------------------------------------------------ saving

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Around everything that may call `save`: whatever happens, a checkpoint on its way comes to its end."""
        of_first(lambda: publishing.remove_leftovers(self.directory))
        try:
            yield
            self.settle(0, wait=True, last=True)
        except BaseException:
            if self._saving is not None:
                self._saving.give_up(_SECONDS_AFTER_ERROR)
            raise

    def save(self, model: Trainable, state: RunState, keep: bool, last: bool = False) -> None:
        """Write a checkpoint, as soon as the one before it is written.

        keep: it stays for good. last: nothing comes after it, so wait for it.
        Where the disk does not take it, the run goes on with a warning; the last one raises UserError.
        """
        step = state.progress.step
        self.settle(step, wait=True)
        # The run goes on counting in these while they are written.
        state = copy.deepcopy(state)
        unfinished = publishing.unfinished_directory(self.directory, state)
        trouble = self._trouble_with(lambda: self._make_way(unfinished, state))
        if not trouble:
            with_reference = model.reference_is_needed
            shards = model.sharded_training_state(with_reference, is_loading=False)
            writer = plan_shards(shards, unfinished / "shards")
            del shards
            self._num_bytes = total(writer.num_bytes)
            trouble = self._trouble_with(lambda: self._check_room(unfinished))
        if trouble:
            return self._conclude(Outcome(error=trouble), unfinished, step, last)
        reached("checkpoint/begun")
        writer.hold(copy=self._asynchronous and not last)

        def publish(parts: Sequence[Part]) -> Outcome:
            return publishing.publish(unfinished, writer, parts, state, self._retention, with_reference, keep)

        name = of_first(lambda: uuid.uuid4().hex)
        self._saving = Saving(name, unfinished, writer, publish, self._explain)
        if last or not self._asynchronous:
            self.settle(step, wait=True, last=last)

    def settle(self, step: int, wait: bool = False, last: bool = False) -> bool:
        """Take note of what became of the checkpoint on its way, if it is at its end on every process.

        step: the last one that was made. wait: until it is at its end. last: raise UserError where it failed.
        Returns whether one that failed is to be tried again after this step.
        """
        if self._saving is not None and (wait or everywhere(self._saving.is_over)):
            saving, self._saving = self._saving, None
            self._conclude(saving.wait(), saving.unfinished, step, last)
        return self._saving is None and self._retries.is_due(step)

    def _conclude(self, outcome: Outcome, unfinished: Path, step: int, last: bool) -> None:
        for note in outcome.notes:
            self._say(f"warning: {note}")
        if outcome.path is not None:
            if self._retries.is_failing:
                self._say(f"{outcome.path} is written: the disk takes checkpoints again.")
            self._newest = outcome.path
            self._retries.succeeded()
            return
        kept = f"{self._newest} is kept" if self._newest else "there is no checkpoint of this run yet"
        target = publishing.finished_directory(unfinished)
        if last:
            raise UserError(
                f"{target} cannot be written ({outcome.error}); {kept}: make room, and run the same command again."
            )
        steps = self._retries.failed(step)
        self._say(
            f"warning: {target} could not be written ({outcome.error}); {kept}. The run goes on, and tries again "
            f"after {steps} step{'s' if steps > 1 else ''}: make room."
        )

    def _trouble_with(self, work: Callable[[], None]) -> str:
        """What the disk has against this, in words, on every process; only the first one does it."""

        def attempt() -> str:
            try:
                work()
            except OSError as error:
                return self._explain(0, error)
            return ""

        return of_first(attempt)

    def _make_way(self, unfinished: Path, state: RunState) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        publishing.remove_leftovers(self.directory)
        self._check_room(unfinished)
        if state.unwritten is not None:
            raise state.unwritten
        publishing.prepare(unfinished, state)

    def _check_room(self, unfinished: Path) -> None:
        """Raises OSError where a checkpoint as large as the last one would not fit."""
        if missing_bytes(self.directory, self._num_bytes):
            shutil.rmtree(unfinished, ignore_errors=True)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _explain(self, rank: int, error: OSError) -> str:
        reason = error.strerror or str(error)
        if rank > 0:
            reason += f", on rank {rank}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            with suppress(OSError):
                if missing := missing_bytes(self.directory, self._num_bytes):
                    reason += f"; {missing / GIB:.2f} GiB more are needed"
        return reason

    # ------------------------------------------------------------------------------------------ resuming

    def restore(
        self, path: Path, model: Trainable, settings: Callable[[int], dict[str, int | str]]
    ) -> tuple[Path, RunState]:
        """Restore the model from a checkpoint or, where that is damaged, from the newest whole one before it.

        settings: of this run in an iteration, which must match those of the checkpoint.
        Returns the one that was used, and the state beside tensors.
        Raises CheckpointError if none is whole, or if it belongs to another run.
        """
        stored = self.newest_whole(path)
        listed = read_manifest(stored.path)
        files: dict[str, list[Path]] = {"rollouts": [], "held_out": []}
        for name in sorted(listed):
            kind, separator, _ = name.partition("/")
            if separator and kind != "shards":
                files.setdefault(kind, []).append(stored.path / name)
        under_way = stored.progress.iteration_step > 0 or bool(files["rollouts"])
        own = settings(stored.progress.iteration) if under_way else {}
        for name, value in stored.settings.items():
            if under_way and own.get(name) != value:
                raise CheckpointError(
                    f"{stored.path} was written in the middle of an iteration with {name} = {value}, and this run has "
                    f"{own.get(name)}: resume with the same, or start in another exp_manager.explicit_log_dir."
                )
        shards = model.sharded_training_state(stored.with_reference, is_loading=True)
        loaded = dist_checkpointing.load(shards, str(stored.path / "shards"))
        model.load_training_state(loaded, mid_iteration=stored.progress.iteration_step > 0)
        self._newest = stored.path
        return stored.path, RunState(stored.progress, stored.settings, stored.metrics, files, stored.ref_id)

    def newest_whole(self, path: Path) -> Stored:
        """`path`, or the newest whole one before it; says what is wrong with those that are passed over.

        Raises CheckpointError if none is whole.
        """
        found, unreadable = of_first(lambda: stored_in(self.directory))
        name = of_first(lambda: pointed_at(self.directory))
        if name and not any(other.name == name for other in (*unreadable, *(s.path for s in found))):
            self._say(f"warning: {self.directory}/latest names {name!r}, which is not there.")
        damaged = [f"{other.name}: {fault}" for other, fault in unreadable.items()]
        start = next((i for i, stored in enumerate(found) if stored.path == path), 0)
        for stored in found[start:]:
            if not (faults := faults_in(stored.path)):
                break
            more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
            damaged.append(f"{stored.path.name}: {faults[0]}{more}")
        else:
            raise CheckpointError(
                f"{self.directory} holds no whole checkpoint ({'; '.join(damaged)}): bring one back, or choose another "
                "exp_manager.explicit_log_dir to start anew."
            )
        for fault in damaged:
            self._say(f"warning: {self.directory}/{fault}: this checkpoint is damaged, and passed over.")
        return stored


def faults_in(path: Path) -> list[str]:
    """What is wrong with a checkpoint, by its manifest and its pickles; every process calls it. Empty for nothing."""
    faults = faults_of(path)
    if not faults:
        try:
            of_first(lambda: check_pickles(path / "shards", path.name))
        except CheckpointError as error:
            faults = [str(error)]
    return faults
