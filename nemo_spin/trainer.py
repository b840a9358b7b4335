"""SPIN: self-play fine-tuning (Chen et al. 2024, arXiv 2401.01335), as this package runs it.

    policy = SFT checkpoint; reference = policy
    for each iteration:
        for each batch, over `max_epochs` epochs:            # fit, run_iteration
            add the reference's own responses                 # augment_dataloader
            step on -log sigmoid(beta * margin)               # train_step
        reference = policy

Where it departs from the paper and from earlier implementations:
- All responses of an iteration, and both reference log-probabilities, are made before its first step, while policy and
  reference are still the same weights: there is no second copy of the model and nothing is generated twice.
  `rollout_window` makes them window by window instead; then the reference waits in host memory.
- At the first step of every iteration the loss has to be ln 2, because policy equals reference. That is checked.

This file knows nothing of ranks: the model, the rollouts and the checkpoints behave the same on every process.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_spin.checkpoint.training import RunState, TrainingCheckpoints
from nemo_spin.config import SpinConfig
from nemo_spin.data.dataset import SFTDataset
from nemo_spin.data.order import batches, epoch_order, epoch_size, num_batches
from nemo_spin.losses import check_policy_equals_reference
from nemo_spin.pairs import Example, Pair
from nemo_spin.progress import Progress
from nemo_spin.reporting import Reporter
from nemo_spin.rollouts import RolloutStore

if TYPE_CHECKING:
    from nemo_spin.model import MegatronGPTSPINModel


@dataclass(frozen=True, slots=True)
class Batch:
    """A global batch of examples, and the epoch of its iteration that it belongs to."""

    epoch: int
    examples: list[Example]


@dataclass(frozen=True, slots=True)
class PairBatch:
    """A global batch with the reference's responses."""

    epoch: int
    pairs: list[Pair]


class SPINTrainer:
    """Runs self-play on a model. `fit` is the whole of it."""

    def __init__(
        self,
        cfg: SpinConfig,
        model: MegatronGPTSPINModel,
        train_dataset: SFTDataset,
        validation_dataset: SFTDataset | None,
        run_dir: Path,
        reporter: Reporter,
    ) -> None:
        """run_dir: gets `rollouts/` and `checkpoints/`; the same on every process and visible to all of them."""
        self.cfg = cfg
        self.model = model
        self.train_dataset = train_dataset
        self.validation_dataset = validation_dataset
        self.run_dir = run_dir
        self.reporter = reporter
        self.checkpoints = TrainingCheckpoints(run_dir / "checkpoints")
        self.progress = Progress()
        self.rollouts = self._empty_rollouts()

    # ------------------------------------------------------------------------------------------ the loop

    def fit(self) -> None:
        """Run every iteration that is left."""
        with self.reporter.run(self.cfg, self.progress):
            if self.progress.step == 0:
                self.reporter.iteration(self.progress, "SFT model", self.validate())
            while self.progress.iteration < self.cfg.loop.max_iterations and self._steps_left_in_run() > 0:
                self.run_iteration()

    def run_iteration(self) -> None:
        """One round of self-play, from where `progress` stands; at its end the policy becomes the reference."""
        self._start_schedule()
        metrics: dict[str, float] = {}
        for batch in self.augment_dataloader(self.train_dataloader()):
            metrics = self.train_step(batch)
            at_end = self._steps_left_in_iteration() == 0
            if at_end or self._is_due(self.cfg.loop.val_check_interval):
                metrics |= self.validate()
            self.reporter.step(self.progress, batch.epoch, metrics, self._steps_per_iteration)
            if not at_end and self._is_due(self.cfg.loop.save_interval):
                self.save(metrics)
        metrics |= self.rollouts.summary()
        self.reporter.iteration(self.progress, f"iteration {self.progress.iteration}", metrics)
        if self.progress.iteration_step == self._steps_per_iteration:
            self.model.refresh_reference()
            self.progress.next_iteration()
            self.rollouts = self._empty_rollouts()
        self.save(metrics)

    def train_dataloader(self) -> Iterator[Batch]:
        """The batches that are left of this iteration, over all its epochs."""
        done = self.progress.iteration_step
        for epoch in range(self.cfg.loop.max_epochs):
            start = min(done, self._batches_per_epoch)
            done -= start
            order = epoch_order(
                self.train_dataset.shares,
                self.cfg.seed,
                self.progress.iteration,
                epoch,
                self.cfg.train_ds.shuffle,
                self.cfg.loop.max_epochs,
            )
            for examples in batches(
                self.train_dataset, order, self.cfg.global_batch_size, start, self._batches_per_epoch
            ):
                yield Batch(epoch, examples)

    def augment_dataloader(self, dataloader: Iterable[Batch]) -> Iterator[PairBatch]:
        """Add the reference's response, and both reference log-probabilities, to every example.

        Rollouts are made for a window of batches at a time: by default the whole iteration, before its first step.
        What an earlier epoch, or the run before an interruption, has rolled out already is used again.
        """
        remaining = islice(dataloader, self._steps_left_in_iteration())
        while window := list(islice(remaining, self._batches_per_window())):
            missing = self.rollouts.missing(example for batch in window for example in batch.examples)
            if missing:
                self.make_rollouts(missing)
            for batch in window:
                yield PairBatch(batch.epoch, [self.rollouts.pair(example) for example in batch.examples])

    def make_rollouts(self, examples: Sequence[Example]) -> None:
        """Let the reference respond to these prompts."""
        started = time.perf_counter()
        with self.reporter.rollouts(self.progress.iteration, len(examples)) as advance:
            made = self.model.roll_out(examples, self.progress.iteration, advance)
        self.rollouts.add(examples, made)
        seconds = time.perf_counter() - started
        self.reporter.log(self.rollouts.summary() | {"time/rollout": seconds}, self.progress.step)

    def train_step(self, batch: PairBatch) -> dict[str, float]:
        """One optimizer step on a global batch of pairs."""
        started = time.perf_counter()
        beta = self.cfg.spin.ref_policy_kl_penalty[self.progress.iteration]
        metrics = self.model.train_step(batch.pairs, beta)
        if self.progress.iteration_step == 0:
            check_policy_equals_reference(metrics, beta, self.cfg.precision)
        self.progress.advance(len(batch.pairs))
        return metrics | {"time/train_step": time.perf_counter() - started}

    def validate(self) -> dict[str, float]:
        """`val_loss`: the mean NLL of a human response token on the validation data, in nats."""
        if self.validation_dataset is None:
            return {}
        total_nll, total_tokens = 0.0, 0
        limit = num_batches(len(self.validation_dataset), self.cfg.global_batch_size, self.cfg.loop.limit_val_batches)
        in_order = epoch_order(len(self.validation_dataset), self.cfg.seed, 0, 0, shuffle=False)
        for examples in batches(self.validation_dataset, in_order, self.cfg.global_batch_size, 0, limit):
            nll, tokens = self.model.validation_step(examples)
            total_nll, total_tokens = total_nll + nll, total_tokens + tokens
        return {"val_loss": total_nll / total_tokens} if total_tokens else {}

    # ------------------------------------------------------------------------------------------ saving and resuming

    def save(self, metrics: dict[str, float]) -> None:
        """Write a checkpoint from which the run goes on exactly as if it had not stopped."""
        self.checkpoints.save(
            self.model,
            RunState(self.progress, self._identity, metrics, self.rollouts.files() if len(self.rollouts) else []),
            keep=self.progress.iteration_step == 0,
        )

    def resume(self, checkpoint: Path) -> None:
        """Take up the run where the checkpoint left it."""
        state = self.checkpoints.load(checkpoint, self.model, self._identity)
        self.progress = state.progress
        self.rollouts = self._empty_rollouts()
        self.rollouts.restore(state.rollout_files)

    # ------------------------------------------------------------------------------------------ counting

    @property
    def _batches_per_epoch(self) -> int:
        num_examples = epoch_size(self.train_dataset.shares)
        return num_batches(num_examples, self.cfg.global_batch_size, self.cfg.loop.limit_train_batches)

    @property
    def _steps_per_iteration(self) -> int:
        return self._batches_per_epoch * self.cfg.loop.max_epochs

    def _steps_left_in_run(self) -> int:
        left = self._steps_per_iteration * (self.cfg.loop.max_iterations - self.progress.iteration)
        left -= self.progress.iteration_step
        limit = self.cfg.loop.max_steps
        return left if limit < 0 else min(left, limit - self.progress.step)

    def _steps_left_in_iteration(self) -> int:
        return min(self._steps_per_iteration - self.progress.iteration_step, self._steps_left_in_run())

    def _batches_per_window(self) -> int:
        window = self.cfg.spin.rollout_window
        return self._steps_per_iteration if window is None else window // self.cfg.global_batch_size

    def _start_schedule(self) -> None:
        done = self.progress.iteration_step
        lr = self.cfg.optim.lr[self.progress.iteration]
        if self.cfg.spin.reset_optimizer:
            self.model.start_schedule(lr, done + self._steps_left_in_iteration(), done, fresh=done == 0)
        else:
            done_in_run = self.progress.step
            self.model.start_schedule(lr, done_in_run + self._steps_left_in_run(), done_in_run, fresh=False)

    def _is_due(self, interval: int | float) -> bool:
        """Whether an interval, in steps or as a fraction of an epoch, ends with this step; 0 and below never do."""
        every = max(round(interval * self._batches_per_epoch), 1) if isinstance(interval, float) else interval
        return interval > 0 and self.progress.iteration_step % every == 0

    @property
    def _identity(self) -> dict[str, int]:
        """What gives the counts in `progress` their meaning: a run can only be resumed with the same."""
        return {
            "model.seed": self.cfg.seed,
            "model.global_batch_size": self.cfg.global_batch_size,
            "number of training examples": len(self.train_dataset),
            "steps of an iteration": self._steps_per_iteration,
        }

    def _empty_rollouts(self) -> RolloutStore:
        directory = self.run_dir / "rollouts" / f"iteration-{self.progress.iteration:03d}"
        return RolloutStore(directory, self.model.tokenizer.decode)
