"""How many steps a run has, how many are left, what is due after which, and the settings that these counts rest on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from nemo_spin.config import LoopConfig, SpinConfig
from nemo_spin.data.dataset import SFTDataset
from nemo_spin.runtime.progress import Progress


class Schedule:
    """The steps of a run. A step is a global batch, the last one of an epoch may be smaller."""

    def __init__(
        self,
        loop: LoopConfig,
        global_batch_size: int,
        pairs_per_epoch: Sequence[int],
        rollout_window: int | None = None,
    ) -> None:
        """pairs_per_epoch: of each iteration. rollout_window: pairs, None for a whole iteration."""
        self._loop, self._global_batch_size, self._rollout_window = loop, global_batch_size, rollout_window
        self._batches = [-(-pairs // global_batch_size) for pairs in pairs_per_epoch]
        self._left_after = [0]
        for iteration in reversed(range(1, loop.max_iterations)):
            self._left_after.append(self._left_after[-1] + self.steps_per_iteration(iteration))
        self._left_after.reverse()

    def batches_per_epoch(self, iteration: int) -> int:
        return self._batches[iteration]

    def steps_per_iteration(self, iteration: int) -> int:
        return self._batches[iteration] * self._loop.max_epochs[iteration]

    def batches_per_window(self, iteration: int) -> int:
        """Batches whose rollouts are made at a time."""
        if self._rollout_window is None:
            return self.steps_per_iteration(iteration)
        return self._rollout_window // self._global_batch_size

    def left_in_window(self, progress: Progress) -> int:
        """Batches up to where the next rollouts are made: a run that goes on makes them where it would have."""
        batches = self.batches_per_window(progress.iteration)
        return batches - progress.iteration_step % batches

    def windows_per_iteration(self, iteration: int) -> int:
        """How often rollouts are made: in the first epoch of an iteration; later ones use them again."""
        batches = self.batches_per_epoch(iteration)
        return -(-batches // min(self.batches_per_window(iteration), batches))

    def left_in_run(self, progress: Progress) -> int:
        if progress.iteration >= self._loop.max_iterations:
            return 0
        of_iteration = self.steps_per_iteration(progress.iteration) - progress.iteration_step
        left = of_iteration + self._left_after[progress.iteration]
        return left if self._loop.max_steps < 0 else min(left, self._loop.max_steps - progress.step)

    def left_in_iteration(self, progress: Progress) -> int:
        return min(self.steps_per_iteration(progress.iteration) - progress.iteration_step, self.left_in_run(progress))

    def windows_left(self, progress: Progress) -> int:
        """How often rollouts are made in the iterations that have not begun."""
        return sum(map(self.windows_per_iteration, range(progress.iteration + 1, self._loop.max_iterations)))

    def is_due(self, interval: int | float, progress: Progress) -> bool:
        """Whether an interval, in steps or as a fraction of an epoch, ends with this step; 0 and below never do."""
        if isinstance(interval, float):
            interval = max(round(interval * self.batches_per_epoch(progress.iteration)), 1)
        return interval > 0 and progress.iteration_step % interval == 0


def resume_settings(cfg: SpinConfig, dataset: SFTDataset, schedule: Schedule, iteration: int) -> dict[str, int | str]:
    """Settings that must match when a run resumes within this iteration, by the names that people know.

    They give the counts of steps and rollouts of an iteration their meaning.
    """
    # Where the run has ended, at the end of its last iteration, another one may follow.
    iteration = min(iteration, cfg.loop.max_iterations - 1)
    sampling = replace(cfg.spin.sampling_params, temperature=cfg.spin.temperature[iteration])
    return {
        "model.seed": cfg.seed,
        "model.global_batch_size": cfg.global_batch_size,
        "number of training examples": len(dataset),
        "training examples of digest": dataset.digest,
        "model.data.train_ds.weights": str(cfg.train_ds.weights),
        "steps of an iteration": schedule.steps_per_iteration(iteration),
        "model.spin.sampling_params": str(sampling),
        "model.spin.length_params": str(cfg.spin.length_params),
        "model.spin.num_generations": cfg.spin.num_generations,
        "model.spin.rejected_selection": cfg.spin.rejected_selection,
        "model.spin.replay_weights": str(cfg.spin.replay_weights[:iteration]),
    }
