"""What a run does when its numbers go wrong: counts skipped steps and ends after too many, and warns of a collapse."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_spin.config import SpinConfig
from nemo_spin.data.dataset import SFTDataset
from nemo_spin.errors import UserError
from nemo_spin.reporting.console import Reporter
from nemo_spin.reporting.events import GuardWarning
from nemo_spin.runtime.progress import Progress
from nemo_spin.selfplay.guards import TREND_STEPS, falling_chosen_warning, rollout_warnings
from nemo_spin.selfplay.non_finite import advice, write_report
from nemo_spin.selfplay.pairs import Pair, trainable

if TYPE_CHECKING:
    from nemo_spin.model import MegatronGPTSPINModel


class Safeguards:
    """Looks at the rollouts and the steps of a run. Each guard warns once in an iteration.

    The steps that a trend is read from are not part of the run's state: after a resume it is looked for anew.
    """

    def __init__(
        self, cfg: SpinConfig, model: MegatronGPTSPINModel, dataset: SFTDataset, run_dir: Path, reporter: Reporter
    ) -> None:
        """run_dir: gets the report of a batch that ends the run."""
        self.cfg, self.model, self.dataset = cfg, model, dataset
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
        diagnosis = self.model.diagnose(pairs)
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
            self.model.tokenizer.decode,
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
