"""How many steps a run has, how many are left, and what is due after which: arithmetic on counts."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_spin.config.schema import LoopConfig
from nemo_spin.data.order import num_batches
from nemo_spin.progress import Progress


@dataclass(frozen=True, slots=True)
class Plan:
    """The steps of a run. A step is a global batch.

    examples_per_epoch: those counted twice that are seen twice. rollout_window: pairs, None for a whole iteration.
    """

    loop: LoopConfig
    global_batch_size: int
    examples_per_epoch: int
    rollout_window: int | None

    @property
    def batches_per_epoch(self) -> int:
        return num_batches(self.examples_per_epoch, self.global_batch_size, self.loop.limit_train_batches)

    @property
    def steps_per_iteration(self) -> int:
        return self.batches_per_epoch * self.loop.max_epochs

    @property
    def batches_per_window(self) -> int:
        """Batches whose rollouts are made at a time."""
        if self.rollout_window is None:
            return self.steps_per_iteration
        return self.rollout_window // self.global_batch_size

    def left_in_window(self, progress: Progress) -> int:
        """Batches up to where the next rollouts are made: a run that goes on makes them where it would have."""
        return self.batches_per_window - progress.iteration_step % self.batches_per_window

    @property
    def windows_per_iteration(self) -> int:
        """How often rollouts are made: in the first epoch of an iteration; later ones use them again."""
        return -(-self.batches_per_epoch // min(self.batches_per_window, self.batches_per_epoch))

    def left_in_run(self, progress: Progress) -> int:
        left = self.steps_per_iteration * (self.loop.max_iterations - progress.iteration) - progress.iteration_step
        return left if self.loop.max_steps < 0 else min(left, self.loop.max_steps - progress.step)

    def left_in_iteration(self, progress: Progress) -> int:
        return min(self.steps_per_iteration - progress.iteration_step, self.left_in_run(progress))

    def iterations_left(self, progress: Progress) -> int:
        """Iterations that have not begun."""
        return self.loop.max_iterations - progress.iteration - 1

    def is_due(self, interval: int | float, progress: Progress) -> bool:
        """Whether an interval, in steps or as a fraction of an epoch, ends with this step; 0 and below never do."""
        every = max(round(interval * self.batches_per_epoch), 1) if isinstance(interval, float) else interval
        return interval > 0 and progress.iteration_step % every == 0
