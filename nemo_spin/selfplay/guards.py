"""What a run does when its numbers go wrong: it warns of a collapse, counts skipped steps, and ends after too many.

The signs of a collapse are pure functions of what a run measures; their thresholds are `model.spin.guards`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

from nemo_spin.config import GuardsConfig, SpinConfig
from nemo_spin.data.dataset import SFTDataset
from nemo_spin.errors import UserError
from nemo_spin.reporting.console import Reporter
from nemo_spin.reporting.events import GuardWarning
from nemo_spin.runtime.progress import Progress
from nemo_spin.selfplay.non_finite import advice, write_report
from nemo_spin.selfplay.pairs import Pair, trainable
from nemo_spin.selfplay.policy import Policy

TREND_STEPS = 50
"""Steps over which a trend is looked for: batches differ too much for fewer."""

# A share of fewer responses than this says nothing.
_FEWEST = 3
# A slope of noise is rarely so many standard errors away from 0, and it is asked after every step.
_STANDARD_ERRORS = 4.0

_GENTLER = "raise model.spin.ref_policy_kl_penalty, lower model.optim.lr or make fewer steps"
_FORMAT = "compare the prompts with those of the SFT, or, if it began after the first iteration, " + _GENTLER
# guard -> metric, what is wrong with so many responses, what to do
_SHARES = {
    "empty": ("rollout/empty", "are nothing but a stop token", _FORMAT),
    "repeated": ("rollout/repeated", "repeat themselves", _FORMAT),
    "cut_off": (
        "rollout/finish_reason_length",
        "ran into the length limit",
        "raise model.spin.length_params.max_length, or see whether the SFT model has learned to stop",
    ),
}


class Guards:
    """Looks at the rollouts and the steps of a run. Each guard warns once in an iteration.

    The steps that a trend is read from are not part of the run's state: after a resume it is looked for anew.
    """

    def __init__(self, cfg: SpinConfig, policy: Policy, dataset: SFTDataset, run_dir: Path, reporter: Reporter) -> None:
        """run_dir: gets the report of a batch that ends the run."""
        self.cfg, self.policy, self.dataset = cfg, policy, dataset
        self.run_dir, self.reporter = run_dir, reporter
        self._warned: set[tuple[int, str]] = set()
        self._iteration = -1
        self._chosen: deque[float] = deque(maxlen=TREND_STEPS)
        self._margins: deque[float] = deque(maxlen=TREND_STEPS)

    def after_rollouts(self, summary: Mapping[str, float], progress: Progress) -> None:
        """Warn of responses that show a collapse. summary: `rollout/*` of the iteration so far."""
        are_samples = self.cfg.spin.samples_itself(progress.iteration)
        self._warn(rollout_warnings(summary, progress.iteration, self.cfg.spin.guards, are_samples), progress)

    def after_step(
        self, metrics: Mapping[str, float], skipped: bool, pairs: Sequence[Pair], progress: Progress
    ) -> dict[str, float]:
        """The step's metrics, as they are to be logged: finite, and with `skipped_steps`.

        progress: has counted the step. Raises UserError when too many in a row were skipped.
        """
        if skipped:
            self._skipped(metrics, pairs, progress)
        else:
            self._look_for_a_trend(metrics, progress)
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        return finite | {"skipped_steps": float(progress.skipped_steps)}

    def _skipped(self, metrics: Mapping[str, float], pairs: Sequence[Pair], progress: Progress) -> None:
        limit = self.cfg.loop.max_skipped_steps
        figures = f"its loss is {metrics['loss']:.4g}, its gradient norm {metrics['grad_norm']:.4g}"
        counts = f"skipped so far: {progress.skipped_steps}, in a row: {progress.skipped_in_a_row}"
        text = f"Step {progress.step:,} was skipped and has changed nothing: {figures} ({counts})."
        self.reporter.warn(GuardWarning("skipped_step", text), progress)
        if progress.skipped_in_a_row <= limit:
            return
        pairs = trainable(pairs)
        diagnosis = self.policy.diagnose(pairs)
        settings = {
            "lr": metrics["lr"],
            "beta": self.cfg.spin.ref_policy_kl_penalty[progress.iteration],
            "precision": self.cfg.precision,
        }
        where = write_report(
            self.run_dir,
            progress,
            {"loss": metrics["loss"], "grad_norm": metrics["grad_norm"], **settings},
            pairs,
            diagnosis,
            self.dataset,
            self.policy.decode,
        )
        before = progress.skipped_in_a_row - 1
        others = f", after {before} others in a row," if before else ""
        raise UserError(
            f"Step {progress.step}{others} has a loss or a gradient that is NaN or infinite "
            f"(trainer.spin.max_skipped_steps: {limit}). {advice(diagnosis, pairs)} {where}."
        )

    def _look_for_a_trend(self, metrics: Mapping[str, float], progress: Progress) -> None:
        if progress.iteration != self._iteration:
            self._iteration = progress.iteration
            self._chosen.clear()
            self._margins.clear()
        self._chosen.append(metrics["rewards/chosen"])
        self._margins.append(metrics["rewards/margins"])
        found = falling_chosen_warning(self._chosen, self._margins, self.cfg.spin.guards.falling_chosen)
        self._warn([found] if found else [], progress)

    def _warn(self, found: Sequence[GuardWarning], progress: Progress) -> None:
        for warning in found:
            if (progress.iteration, warning.guard) not in self._warned:
                self._warned.add((progress.iteration, warning.guard))
                self.reporter.warn(warning, progress)


def rollout_warnings(
    summary: Mapping[str, float], iteration: int, guards: GuardsConfig, are_samples: bool
) -> list[GuardWarning]:
    """Of an iteration's responses, from their `rollout/*` metrics.

    are_samples: they were drawn from the reference, so that its certainty about them is its entropy.
    """
    number = round(summary["rollout/responses"])
    found = []
    for guard, (metric, what, remedy) in _SHARES.items():
        limit, share = getattr(guards, guard), summary[metric]
        if limit is not None and share >= limit and round(share * number) >= _FEWEST:
            text = (
                f"{share:.1%} of the {number:,} generated responses of iteration {iteration} {what} "
                f"(model.spin.guards.{guard}: {limit:.4g}): {remedy}."
            )
            found.append(GuardWarning(guard, text))
    entropy = summary.get("rollout/entropy", math.inf)
    if guards.entropy is not None and are_samples and number >= _FEWEST and entropy < guards.entropy:
        text = (
            f"The generated responses of iteration {iteration} have an entropy of {entropy:.2g} nats per token "
            f"(model.spin.guards.entropy: {guards.entropy:.4g}), so that a prompt has nearly the same one each time: "
            f"{_GENTLER}, unless prompts have but one answer."
        )
        found.append(GuardWarning("entropy", text))
    if summary["rollout/not_finite"] > 0:
        text = (
            f"The reference's log-probabilities of {summary['rollout/not_finite']:.2%} of the {number:,} pairs of "
            f"iteration {iteration} are NaN or infinite, and these pairs are left out of training: look at them in "
            "rollouts/, and try trainer.precision=32."
        )
        found.append(GuardWarning("reference_not_finite", text))
    return found


def falling_chosen_warning(
    chosen: Sequence[float], margins: Sequence[float], threshold: float | None
) -> GuardWarning | None:
    """Of the last steps' `rewards/chosen` and `rewards/margins`, if they are at least `TREND_STEPS`.

    Both have to have a trend that is more than noise: the first falls, by at least `threshold` times what the second
    gains.
    """
    if threshold is None or len(chosen) < TREND_STEPS:
        return None
    change, certainty = trend(chosen)
    gain, certainty_of_gain = trend(margins)
    if certainty > -_STANDARD_ERRORS or certainty_of_gain < _STANDARD_ERRORS or -change < threshold * gain:
        return None
    text = (
        f"Over the last {len(chosen)} steps rewards/chosen fell by {-change:.3g} while rewards/margins grew by "
        f"{gain:.3g} (model.spin.guards.falling_chosen: {threshold:.4g} of it), so human responses become less likely: "
        f"{_GENTLER} if val_loss rises or the answers get worse."
    )
    return GuardWarning("falling_chosen", text)


def trend(values: Sequence[float]) -> tuple[float, float]:
    """The change from first to last along the least-squares line, and how many of its standard errors that is.

    values: at least three, one a step.
    """
    count = len(values)
    offsets = [i - (count - 1) / 2 for i in range(count)]
    mean = math.fsum(values) / count
    spread = math.fsum(offset * offset for offset in offsets)
    slope = math.fsum(offset * value for offset, value in zip(offsets, values, strict=True)) / spread
    rest = math.fsum((v - mean - slope * offset) ** 2 for offset, v in zip(offsets, values, strict=True))
    error = math.sqrt(rest / (count - 2) / spread)
    if error == 0.0:
        return slope * (count - 1), math.copysign(math.inf, slope) if slope else 0.0
    return slope * (count - 1), slope / error
