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
from enum import Enum, auto
from itertools import islice
from pathlib import Path
from typing import Protocol

from nemo_spin.checkpoint.manager import Trainable, TrainingCheckpoints
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
from nemo_spin.selfplay.equilibrium import EquilibriumCheck
from nemo_spin.selfplay.guards import Guards
from nemo_spin.selfplay.iteration_pairs import Batch, IterationPairs, PairBatch, PairId
from nemo_spin.selfplay.losses import check_policy_equals_reference
from nemo_spin.selfplay.policy import Policy
from nemo_spin.selfplay.reference import name_of_checkpoint
from nemo_spin.selfplay.replay import Replay
from nemo_spin.selfplay.schedule import Schedule, resume_settings
from nemo_spin.selfplay.validation import Validation


class After(Enum):
    """What comes after a step, or after the beginning of an iteration."""

    CONTINUE = auto()
    END_OF_ITERATION = auto()
    INTERRUPTED = auto()
    EQUILIBRIUM = auto()


class TrainedPolicy(Policy, Trainable, Protocol):
    """A policy whose state goes into checkpoints."""


class SPINTrainer:
    """Runs self-play on a policy. `fit` is the whole of it."""

    def __init__(
        self,
        cfg: SpinConfig,
        policy: TrainedPolicy,
        train_dataset: SFTDataset,
        validation_dataset: SFTDataset | None,
        run_dir: Path,
        reporter: Reporter,
        stopping: Stopping | None = None,
    ) -> None:
        """run_dir: gets `rollouts/` and `checkpoints/`; the same on every process and visible to all of them."""
        self.cfg = cfg
        self.policy = policy
        self.train_dataset = train_dataset
        self.run_dir = run_dir
        self.reporter = reporter
        self.stopping = stopping or Stopping(cfg.loop.max_seconds)
        self.checkpoints = TrainingCheckpoints(run_dir / "checkpoints", cfg.checkpoint, reporter.say)
        self.replay = Replay.of_run(cfg, train_dataset.shares)
        pairs_per_epoch = [self.replay.pairs_per_epoch(iteration) for iteration in range(cfg.loop.max_iterations)]
        self.schedule = Schedule(cfg.loop, cfg.global_batch_size, pairs_per_epoch, cfg.spin.rollout_window)
        interrupted = self.stopping.interrupted
        directory = run_dir / "rollouts"
        self.pairs = IterationPairs(cfg, policy, train_dataset, self.replay, directory, reporter, interrupted)
        self.validation = Validation(cfg, policy, validation_dataset, directory / "held_out", reporter, interrupted)
        self.equilibrium = EquilibriumCheck(cfg, self.pairs.generated, self.validation, train_dataset, reporter)
        self.guards = Guards(cfg, policy, train_dataset, run_dir, reporter)
        self.progress = Progress()
        self.stopwatch = Stopwatch(lambda activity: beat(f"{activity}, {self.progress}"))
        self.ref_id = name_of_checkpoint(cfg.restore_from_path)

    # ------------------------------------------------------------------------------------------ the loop

    def fit(self) -> bool:
        """Run the remaining iterations, stopping early at equilibrium. Returns False if interrupted."""
        steps = self.progress.step + self.schedule.left_in_run(self.progress)
        with self.reporter.run(self.cfg, self.progress, steps), self.checkpoints.writing():
            self._begin_rollouts()
            if (
                self.progress.step == 0
                and self.pairs.generated.store.is_empty
                and self.validation.rollouts.store.is_empty
            ):
                self.reporter.iteration(self.progress, "SFT model", self.validate())
            while self.schedule.left_in_run(self.progress) > 0 and not self.stopping.asked:
                if self.run_iteration() is After.EQUILIBRIUM:
                    break
            finished = self.schedule.left_in_run(self.progress) == 0 or bool(self.equilibrium.reason)
            if finished:
                self.reporter.end(self.progress, self.equilibrium.reason)
        return finished

    def run_iteration(self) -> After:
        """One round of self-play, from where `progress` stands; at its end the policy becomes the reference."""
        self._start_lr_schedule()
        after, metrics = self.begin_iteration(), {}
        if after is After.CONTINUE:
            # Without another step: interrupted while responses were generated.
            after = After.INTERRUPTED
            for batch in self.augment_dataloader(self.train_dataloader()):
                after, metrics = self.step(batch)
                if after is not After.CONTINUE:
                    break
        if after is After.END_OF_ITERATION:
            self.end_iteration(metrics)
        return after

    def begin_iteration(self) -> After:
        """Generate the held-out responses, and see by them whether the run is at equilibrium."""
        if self.progress.iteration_step == 0 and self.validation.make_rollouts(self.stopping.ask):
            self.save({})
            return After.INTERRUPTED
        return After.EQUILIBRIUM if self.equilibrium.ends(self.progress) else After.CONTINUE

    def step(self, batch: PairBatch) -> tuple[After, dict[str, float]]:
        """Train on a batch, then validate, report and save what is due. Returns the step's metrics as well."""
        self.equilibrium.look_at_training(self.progress)
        metrics = self.train_step(batch)
        is_last = self.schedule.left_in_iteration(self.progress) == 0
        stop = self.stopping.ask()
        if is_last or (self.schedule.is_due(self.cfg.loop.val_check_interval, self.progress) and not stop):
            metrics |= self.validate()
        self.reporter.step(
            self.progress,
            batch.epoch,
            metrics,
            self.schedule.steps_per_iteration(self.progress.iteration),
            self._seconds_left(),
        )
        retry = self.checkpoints.settle(self.progress.step)
        if is_last:
            return After.END_OF_ITERATION, metrics
        if stop or retry or self.schedule.is_due(self.cfg.loop.save_interval, self.progress):
            self.save(metrics)
        return (After.INTERRUPTED if stop else After.CONTINUE), metrics

    def end_iteration(self, metrics: dict[str, float]) -> None:
        """Report the iteration, refresh the reference, and save. metrics: of the last step."""
        metrics |= self.pairs.summary() | {"time/rollout_share": self.stopwatch.share("rollout")}
        row = metrics | self.equilibrium.metrics
        self.reporter.iteration(self.progress, f"iteration {self.progress.iteration}", row)
        self.reporter.log("iteration", self.progress, metrics)
        self.equilibrium.iteration_is_over(metrics)
        # `max_steps` may end the run within an iteration, which then stays open.
        if self.progress.iteration_step == self.schedule.steps_per_iteration(self.progress.iteration):
            if self.cfg.spin.refresh_reference:
                self.ref_id = self.policy.refresh_reference()
            self.progress.next_iteration()
            reached("iteration/refreshed")
            self._begin_rollouts()
        self.save(metrics)

    def train_dataloader(self) -> Iterator[Batch]:
        """The batches that are left of this iteration, over all its epochs."""
        iteration, done = self.progress.iteration, self.progress.iteration_step
        batches = self.schedule.batches_per_epoch(iteration)
        for epoch in range(self.cfg.loop.max_epochs[iteration]):
            start = min(done, batches)
            done -= start
            if start < batches:
                for rows in index_batches(self.replay.epoch(iteration, epoch), self.cfg.global_batch_size, start):
                    yield Batch(epoch, [PairId(*row) for row in rows.tolist()])

    def augment_dataloader(self, dataloader: Iterable[Batch]) -> Iterator[PairBatch]:
        """Add the reference's responses, and its log-probabilities of these and of the human ones, to every batch.

        Rollouts are made for a window of batches at a time: by default the whole iteration, before its first step.
        What an earlier epoch, or the run before an interruption, has rolled out already is used again.
        """
        remaining = islice(dataloader, self.schedule.left_in_iteration(self.progress))
        size = self.schedule.left_in_window(self.progress)
        while window := list(islice(remaining, size)):
            self.make_rollouts([pair for batch in window for pair in batch.pairs])
            if self.stopping.asked:
                return
            for batch in window:
                yield PairBatch(batch.epoch, [self.pairs.pair(pair) for pair in batch.pairs])
            size = self.schedule.batches_per_window(self.progress.iteration)

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
        self.guards.after_rollouts(self.pairs.summary(), self.progress)
        self.reporter.samples(store.samples(self.cfg.loop.log_samples), self.progress)
        if self.stopping.asked:
            self.save({})

    def train_step(self, batch: PairBatch) -> dict[str, float]:
        """One optimizer step on a global batch of pairs; where loss or gradient are not finite, it changes nothing."""
        beta = self.cfg.spin.ref_policy_kl_penalty[self.progress.iteration]
        with self.stopwatch.measure("train_step"):
            metrics = self.policy.train_step(batch.pairs, beta)
        skipped = metrics.pop("skipped") > 0
        is_reference = self.progress.policy_is_reference and (
            self.cfg.spin.refresh_reference or self.progress.iteration == 0
        )
        if is_reference and not skipped:
            check_policy_equals_reference(metrics, beta, self.cfg.precision, self.cfg.spin.loss)
        self.progress.advance(len(batch.pairs), skipped)
        reached("train/step")
        seconds = self.stopwatch.last["train_step"]
        return self.guards.after_step(metrics, skipped, batch.pairs, self.progress) | {
            "time/train_step": seconds,
            "throughput/train_tokens_per_second": sum(pair.num_tokens for pair in batch.pairs) / seconds,
            "memory/peak_gib": self.policy.peak_memory() / 2**30,
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
        unwritten = self.pairs.unwritten or self.validation.rollouts.store.unwritten
        settings = self._resume_settings(self.progress.iteration)
        with self.stopwatch.measure("checkpoint"):
            self.checkpoints.save(
                self.policy,
                RunState(self.progress, settings, metrics, files, self.ref_id, unwritten),
                keep=self.progress.iteration_step == 0,
                last=self.stopping.asked or self.schedule.left_in_run(self.progress) == 0,
            )
        self.reporter.log("checkpoint", self.progress, {"time/checkpoint": self.stopwatch.last["checkpoint"]})

    def resume(self, checkpoint: Path) -> Path:
        """Take up the run where the checkpoint left it, or the newest whole one before it. Returns the one used."""
        used, state = self.checkpoints.restore(checkpoint, self.policy, self._resume_settings)
        self.progress, self.ref_id = state.progress, state.ref_id
        self.equilibrium.iteration_is_over(state.metrics)
        self.pairs.resume(state.rollout_files, str(state.settings.get("training examples of digest")))
        self.validation.rollouts.resume(state.rollout_files["held_out"])
        return used

    def _begin_rollouts(self) -> None:
        """Turn to the rollouts of this iteration: there may be some that the same reference has made."""
        self.pairs.begin(self.progress.iteration, self.ref_id)
        self.validation.rollouts.begin(self.progress.iteration, self.ref_id)

    def _resume_settings(self, iteration: int) -> dict[str, int | str]:
        return resume_settings(self.cfg, self.train_dataset, self.schedule, iteration)

    def _start_lr_schedule(self) -> None:
        """Over the iteration, or over the run where the optimizer's state is kept."""
        reset = self.cfg.spin.reset_optimizer
        done = self.progress.iteration_step if reset else self.progress.step
        left = (self.schedule.left_in_iteration if reset else self.schedule.left_in_run)(self.progress)
        lr = self.cfg.optim.lr[self.progress.iteration]
        self.policy.start_lr_schedule(lr, done + left, done, fresh=reset and done == 0)

    def _seconds_left(self) -> float:
        """To the end of the run, if it goes on as it did so far."""
        windows = self.schedule.windows_left(self.progress)
        steps = self.schedule.left_in_run(self.progress)
        return steps * self.stopwatch.mean("train_step") + windows * self.stopwatch.mean("rollout")
