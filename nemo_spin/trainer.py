"""SPIN: self-play fine-tuning (Chen et al. 2024, arXiv 2401.01335), as this package runs it.

    policy = SFT checkpoint; reference = policy
    for each iteration:
        for each batch, over `max_epochs` epochs:            # fit, run_iteration, train_dataloader
            add the reference's own responses                 # augment_dataloader
            step on -log sigmoid(beta * margin)               # train_step
        reference = policy

From the second iteration on an epoch has the pairs of earlier iterations as well, with log-probabilities of the present
reference (`selfplay/replay.py`, `selfplay/iteration_pairs.py`), as in the paper's experiments.

Where it departs from the paper and from earlier implementations:
- All responses of an iteration, and both reference log-probabilities, are made before its first step, while policy and
  reference are still the same weights: there is no second copy of the model and nothing is generated twice.
  `rollout_window` makes them window by window instead; then the reference waits in host memory.
- At the first step of every iteration the loss has to be ln 2, because policy equals reference. That is checked.

This file knows nothing of ranks: the model, the rollouts and the checkpoints behave the same on every process.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_spin.checkpoint.manager import TrainingCheckpoints
from nemo_spin.checkpoint.run_state import RunState
from nemo_spin.config import SpinConfig
from nemo_spin.data.dataset import SFTDataset
from nemo_spin.data.order import index_batches
from nemo_spin.reporting.console import Reporter
from nemo_spin.runtime.kill_points import reached
from nemo_spin.runtime.progress import Progress
from nemo_spin.runtime.stopping import Stopping
from nemo_spin.runtime.timing import Stopwatch
from nemo_spin.runtime.watchdog import beat
from nemo_spin.selfplay.equilibrium_check import EquilibriumCheck
from nemo_spin.selfplay.identity import identity_of_run
from nemo_spin.selfplay.iteration_pairs import IterationPairs, PairId
from nemo_spin.selfplay.losses import check_policy_equals_reference
from nemo_spin.selfplay.pairs import Pair
from nemo_spin.selfplay.plan import Plan
from nemo_spin.selfplay.reference import name_of_checkpoint
from nemo_spin.selfplay.replay import Mixture
from nemo_spin.selfplay.safeguards import Safeguards
from nemo_spin.selfplay.validation import Validation

if TYPE_CHECKING:
    from nemo_spin.model import MegatronGPTSPINModel


@dataclass(frozen=True, slots=True)
class Batch:
    """Which pairs a global batch has, and the epoch of its iteration that it belongs to."""

    epoch: int
    pairs: list[PairId]


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
        stopping: Stopping | None = None,
    ) -> None:
        """run_dir: gets `rollouts/` and `checkpoints/`; the same on every process and visible to all of them."""
        self.cfg = cfg
        self.model = model
        self.train_dataset = train_dataset
        self.run_dir = run_dir
        self.reporter = reporter
        self.stopping = stopping or Stopping(cfg.loop.max_seconds)
        self.checkpoints = TrainingCheckpoints(run_dir / "checkpoints", cfg.checkpoint, reporter.say)
        self.mixture = Mixture(
            train_dataset.shares, cfg.global_batch_size, cfg.loop.max_epochs, cfg.loop.limit_train_batches,
            cfg.spin.pairs_per_example, cfg.spin.replay_weights, cfg.seed, cfg.train_ds.shuffle,
        )  # fmt: skip
        pairs_per_epoch = [self.mixture.pairs_per_epoch(iteration) for iteration in range(cfg.loop.max_iterations)]
        self.plan = Plan(cfg.loop, cfg.global_batch_size, pairs_per_epoch, cfg.spin.rollout_window)
        interrupted = self.stopping.interrupted
        directory = run_dir / "rollouts"
        self.pairs = IterationPairs(cfg, model, train_dataset, self.mixture, directory, reporter, interrupted)
        self.validation = Validation(cfg, model, validation_dataset, directory / "held_out", reporter, interrupted)
        self.equilibrium = EquilibriumCheck(cfg, self.pairs.generated, self.validation, train_dataset, reporter)
        self.safeguards = Safeguards(cfg, model, train_dataset, run_dir, reporter)
        self.progress = Progress()
        self.stopwatch = Stopwatch(lambda activity: beat(f"{activity}, {self.progress}"))
        self.ref_id = name_of_checkpoint(cfg.restore_from_path)

    # ------------------------------------------------------------------------------------------ the loop

    def fit(self) -> bool:
        """Run every iteration that is left, up to the equilibrium. Returns whether none is; else it was stopped."""
        steps = self.progress.step + self.plan.left_in_run(self.progress)
        with self.reporter.run(self.cfg, self.progress, steps), self.checkpoints.writing():
            self._begin_rollouts()
            if (
                self.progress.step == 0
                and self.pairs.generated.store.is_empty
                and self.validation.rollouts.store.is_empty
            ):
                self.reporter.iteration(self.progress, "SFT model", self.validate())
            while self.plan.left_in_run(self.progress) > 0 and not (self.stopping.asked or self.equilibrium.reason):
                self.run_iteration()
            finished = self.plan.left_in_run(self.progress) == 0 or bool(self.equilibrium.reason)
            if finished:
                self.reporter.end(self.progress, self.equilibrium.reason)
        return finished

    def run_iteration(self) -> None:
        """One round of self-play, from where `progress` stands; at its end the policy becomes the reference."""
        self._start_schedule()
        if self.progress.iteration_step == 0 and self.validation.make_rollouts(self.stopping.ask):
            return self.save({})
        if self.equilibrium.ends(self.progress):
            return
        metrics: dict[str, float] = {}
        for batch in self.augment_dataloader(self.train_dataloader()):
            self.equilibrium.look_at_training(self.progress)
            metrics = self.train_step(batch)
            at_end = self.plan.left_in_iteration(self.progress) == 0
            stop = self.stopping.ask()
            if at_end or (self.plan.is_due(self.cfg.loop.val_check_interval, self.progress) and not stop):
                metrics |= self.validate()
            steps = self.plan.steps_per_iteration(self.progress.iteration)
            self.reporter.step(self.progress, batch.epoch, metrics, steps, self._seconds_left())
            again = self.checkpoints.settle(self.progress.step)
            due = again or self.plan.is_due(self.cfg.loop.save_interval, self.progress)
            if not at_end and (stop or due):
                self.save(metrics)
            if stop:
                break
        if self.plan.left_in_iteration(self.progress) > 0:
            return
        metrics |= self.pairs.summary() | {"time/rollout_share": self.stopwatch.share("rollout")}
        row = metrics | self.equilibrium.metrics
        self.reporter.iteration(self.progress, f"iteration {self.progress.iteration}", row)
        self.reporter.log("iteration", self.progress, metrics)
        self.equilibrium.iteration_is_over(metrics)
        if self.progress.iteration_step == self.plan.steps_per_iteration(self.progress.iteration):
            if self.cfg.spin.refresh_reference:
                self.ref_id = self.model.refresh_reference()
            self.progress.next_iteration()
            reached("iteration/refreshed")
            self._begin_rollouts()
        self.save(metrics)

    def train_dataloader(self) -> Iterator[Batch]:
        """The batches that are left of this iteration, over all its epochs."""
        iteration, done = self.progress.iteration, self.progress.iteration_step
        batches = self.plan.batches_per_epoch(iteration)
        for epoch in range(self.cfg.loop.max_epochs[iteration]):
            start = min(done, batches)
            done -= start
            if start < batches:
                for rows in index_batches(self.mixture.epoch(iteration, epoch), self.cfg.global_batch_size, start):
                    yield Batch(epoch, [PairId(*row) for row in rows.tolist()])

    def augment_dataloader(self, dataloader: Iterable[Batch]) -> Iterator[PairBatch]:
        """Add the reference's responses, and its log-probabilities of these and of the human ones, to every batch.

        Rollouts are made for a window of batches at a time: by default the whole iteration, before its first step.
        What an earlier epoch, or the run before an interruption, has rolled out already is used again.
        """
        remaining = islice(dataloader, self.plan.left_in_iteration(self.progress))
        size = self.plan.left_in_window(self.progress)
        while window := list(islice(remaining, size)):
            self.make_rollouts([pair for batch in window for pair in batch.pairs])
            if self.stopping.asked:
                return
            for batch in window:
                yield PairBatch(batch.epoch, [self.pairs.pair(pair) for pair in batch.pairs])
            size = self.plan.batches_per_window(self.progress.iteration)

    def make_rollouts(self, pairs: Sequence[PairId]) -> None:
        """Let the reference make what these pairs lack; stops, and saves, when it is asked to."""
        if self.pairs.is_made(pairs):
            return
        store = self.pairs.generated.store
        tokens_before = store.figures.num_tokens
        with self.stopwatch.measure("rollout"):
            self.pairs.make(pairs, self.stopping.ask)
        seconds = self.stopwatch.last["rollout"]
        speed = (store.figures.num_tokens - tokens_before) / seconds
        timing = {"time/rollout": seconds, "throughput/rollout_tokens_per_second": speed}
        self.reporter.log("rollout", self.progress, self.pairs.summary() | timing)
        self.safeguards.after_rollouts(self.pairs.summary(), self.progress)
        self.reporter.samples(store.samples(self.cfg.loop.log_samples), self.progress)
        if self.stopping.asked:
            self.save({})

    def train_step(self, batch: PairBatch) -> dict[str, float]:
        """One optimizer step on a global batch of pairs; where loss or gradient are not finite, it changes nothing."""
        beta = self.cfg.spin.ref_policy_kl_penalty[self.progress.iteration]
        with self.stopwatch.measure("train_step"):
            metrics = self.model.train_step(batch.pairs, beta)
        skipped = metrics.pop("skipped") > 0
        is_reference = self.progress.policy_is_reference and (
            self.cfg.spin.refresh_reference or self.progress.iteration == 0
        )
        if is_reference and not skipped:
            check_policy_equals_reference(metrics, beta, self.cfg.precision, self.cfg.spin.loss)
        self.progress.advance(len(batch.pairs), skipped)
        reached("train/step")
        seconds = self.stopwatch.last["train_step"]
        return self.safeguards.after_step(metrics, skipped, batch.pairs, self.progress) | {
            "time/train_step": seconds,
            "throughput/train_tokens_per_second": sum(pair.num_tokens for pair in batch.pairs) / seconds,
            "memory/peak_gib": self.model.peak_memory() / 2**30,
        }

    def validate(self) -> dict[str, float]:
        """The policy's figures on the validation data; none without such data."""
        with self.stopwatch.measure("validation"):
            metrics = self.validation.measure(self.progress.iteration)
        if metrics:
            timing = {"time/validation": self.stopwatch.last["validation"]}
            self.reporter.log("validation", self.progress, metrics | timing)
        return metrics

    # ------------------------------------------------------------------------------------------ saving and resuming

    def save(self, metrics: dict[str, float]) -> None:
        """Write a checkpoint from which the run goes on exactly as if it had not stopped; the last one is awaited."""
        files = self.pairs.write() | {"held_out": self.validation.rollouts.store.write()}
        with self.stopwatch.measure("checkpoint"):
            self.checkpoints.save(
                self.model,
                RunState(
                    self.progress,
                    self._identity(self.progress.iteration),
                    metrics,
                    files,
                    self.ref_id,
                    self.pairs.unwritten or self.validation.rollouts.store.unwritten,
                ),
                keep=self.progress.iteration_step == 0,
                last=self.stopping.asked or self.plan.left_in_run(self.progress) == 0,
            )
        self.reporter.log("checkpoint", self.progress, {"time/checkpoint": self.stopwatch.last["checkpoint"]})

    def resume(self, checkpoint: Path) -> Path:
        """Take up the run where the checkpoint left it, or the newest whole one before it. Returns the one used."""
        used, state = self.checkpoints.restore(checkpoint, self.model, self._identity)
        self.progress, self.ref_id = state.progress, state.ref_id
        self.equilibrium.iteration_is_over(state.metrics)
        self.pairs.resume(state.rollout_files, str(state.identity.get("training examples of digest")))
        self.validation.rollouts.resume(state.rollout_files["held_out"])
        return used

    def _begin_rollouts(self) -> None:
        """Turn to the rollouts of this iteration: there may be some that the same reference has made."""
        self.pairs.begin(self.progress.iteration, self.ref_id)
        self.validation.rollouts.begin(self.progress.iteration, self.ref_id)

    def _identity(self, iteration: int) -> dict[str, int | str]:
        return identity_of_run(self.cfg, self.train_dataset, self.plan, iteration)

    def _start_schedule(self) -> None:
        done = self.progress.iteration_step
        lr = self.cfg.optim.lr[self.progress.iteration]
        if self.cfg.spin.reset_optimizer:
            self.model.start_schedule(lr, done + self.plan.left_in_iteration(self.progress), done, fresh=done == 0)
        else:
            done_in_run = self.progress.step
            self.model.start_schedule(lr, done_in_run + self.plan.left_in_run(self.progress), done_in_run, fresh=False)

    def _seconds_left(self) -> float:
        """To the end of the run, if it goes on as it did so far."""
        windows = self.plan.windows_left(self.progress)
        steps = self.plan.left_in_run(self.progress)
        return steps * self.stopwatch.mean("train_step") + windows * self.stopwatch.mean("rollout")
