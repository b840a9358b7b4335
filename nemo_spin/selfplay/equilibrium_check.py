"""At every iteration's start: how far the generated responses are from the human ones, and whether the run ends there.

What it decides by is in every checkpoint of an iteration's start: the rollouts, which are functions of seed and
weights, and the accuracy of the last validation. So a run that goes on from there decides as an uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import TYPE_CHECKING

from nemo_spin.config import SpinConfig
from nemo_spin.runtime.collectives import of_first
from nemo_spin.runtime.progress import Progress
from nemo_spin.selfplay.equilibrium import PREFIX, equilibrium_metrics, in_words, is_reached, reason
from nemo_spin.selfplay.pairs import Pair
from nemo_spin.selfplay.rollouts.iteration import IterationRollouts

if TYPE_CHECKING:
    from nemo_spin.data.dataset import SFTDataset
    from nemo_spin.reporting.console import Reporter
    from nemo_spin.selfplay.validation import Validation

_ACCURACY = "val/rewards/accuracies"
# More training pairs than these make the figures no better, and take seconds to count.
_MOST_PAIRS = 20_000


class EquilibriumCheck:
    """Every process calls every method, at the same point of the run.

    metrics: `equilibrium/*` of the iteration under way; empty before they are measured, and after a resume in its
        middle.
    reason: why the run ends, in one sentence; empty while it does not.
    """

    def __init__(
        self,
        cfg: SpinConfig,
        rollouts: IterationRollouts,
        validation: Validation,
        dataset: SFTDataset,
        reporter: Reporter,
    ) -> None:
        """rollouts: of the training data, `dataset`; they are looked at where validation has none."""
        self._limits = cfg.loop.stop_at_equilibrium
        self._rollouts, self._validation, self._dataset, self._reporter = rollouts, validation, dataset, reporter
        self._accuracy: dict[str, float] = {}
        self.metrics: dict[str, float] = {}
        self.reason = ""

    def iteration_is_over(self, metrics: Mapping[str, float]) -> None:
        """metrics: of the iteration's end, or of a checkpoint that stands at the next one's start."""
        self.metrics = {}
        accuracy = metrics.get(_ACCURACY, math.nan)
        self._accuracy = {PREFIX + "accuracy": accuracy} if math.isfinite(accuracy) else {}

    def ends(self, progress: Progress) -> bool:
        """Look at the held-out rollouts, if this is an iteration's start. Returns whether the run ends before it."""
        indices = self._validation.held_out.indices
        if progress.iteration_step or not indices:
            return False
        self._measure((self._validation.rollouts.store.pair(index) for index in indices), progress, held_out=True)
        self.reason = reason(self.metrics, self._limits, progress.iteration) if self._is_reached() else ""
        if self.reason:
            self._reporter.say(self.reason)
        return bool(self.reason)

    def look_at_training(self, progress: Progress) -> None:
        """Look at the rollouts for training, if this is an iteration's start and there are no held-out ones."""
        if progress.iteration_step or self._validation.held_out.indices:
            return
        made = set(range(len(self._dataset))).difference(self._rollouts.store.missing(range(len(self._dataset))))
        first = islice(sorted(made), _MOST_PAIRS)
        self._measure((self._rollouts.store.pair(index) for index in first), progress, held_out=False)

    def _measure(self, pairs: Iterable[Pair], progress: Progress, held_out: bool) -> None:
        def measure() -> tuple[dict[str, float], int]:
            # the generator is gone through on the first process only
            found = list(pairs)
            measured = equilibrium_metrics(found, self._dataset.stop_ids)
            return measured and measured | self._accuracy, len(found)

        self.metrics, count = of_first(measure)
        if not self.metrics:
            return
        self._reporter.say(in_words(self.metrics, progress.iteration, count, held_out))
        flag = {PREFIX + "reached": float(self._is_reached())} if self._limits.is_asked_for else {}
        self._reporter.log("equilibrium", progress, self.metrics | flag)

    def _is_reached(self) -> bool:
        return is_reached(self.metrics, self._limits)
