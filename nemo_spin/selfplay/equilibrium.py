"""How far generated responses are from human ones at the start of an iteration, and whether the run ends there.

At the equilibrium of self-play the policy's responses cannot be told from the data's. No single figure shows that, so
there are several, pure functions of pairs, and a run ends by those for which it was given limits
(`trainer.spin.stop_at_equilibrium`).

What the decision rests on is in every checkpoint at an iteration's start: the rollouts, which are functions of seed and
weights, and the accuracy of the last validation. So a resumed run decides as an uninterrupted one.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice

from nemo_spin.config import EquilibriumConfig, SpinConfig
from nemo_spin.data.dataset import SFTDataset
from nemo_spin.reporting.console import Reporter
from nemo_spin.runtime.collectives import of_first
from nemo_spin.runtime.progress import Progress
from nemo_spin.selfplay.pairs import Pair, has_finite_logps
from nemo_spin.selfplay.rollouts.iteration import IterationRollouts
from nemo_spin.selfplay.validation import Validation

PREFIX = "equilibrium/"
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


def equilibrium_metrics(pairs: Sequence[Pair], stop_ids: frozenset[int]) -> dict[str, float]:
    """`equilibrium/*` of an iteration's pairs, by their full names; none of no pairs.

    `logps_gap`, `logps_gap_error`: see `logps_gap`. `exact_match`: share of generated responses that are the human one.
    `token_overlap`: mean of `token_overlap`, a stop token at the end (one of `stop_ids`) left out.
    """
    if not pairs:
        return {}
    matches = sum(tuple(pair.rejected_ids) == tuple(pair.example.response_ids) for pair in pairs)
    overlaps = [
        token_overlap(_without_stop(pair.example.response_ids, stop_ids), _without_stop(pair.rejected_ids, stop_ids))
        for pair in pairs
    ]
    values = logps_gap(pairs) | {
        "exact_match": matches / len(pairs),
        "token_overlap": math.fsum(overlaps) / len(pairs),
    }
    return {PREFIX + name: value for name, value in values.items()}


def logps_gap(pairs: Sequence[Pair]) -> dict[str, float]:
    """`logps_gap`: mean log-probability of a token under the reference, of generated responses minus human ones, in
    nats, each the sum over all responses by the number of their tokens; `logps_gap_error`: its standard error.

    Pairs whose log-probabilities are not finite do not count; the gap is left out where there are no others.
    The error is that of two ratios (the delta method), paired: both responses to a prompt vary with it. Several pairs
    of one example are taken as one, because they are not independent. It is left out for a single example.
    """
    finite = list(filter(has_finite_logps, pairs))
    human_tokens = sum(len(pair.example.response_ids) for pair in finite)
    generated_tokens = sum(len(pair.rejected_ids) for pair in finite)
    if not human_tokens or not generated_tokens:
        return {}
    human = math.fsum(pair.ref_chosen_logps for pair in finite) / human_tokens
    generated = math.fsum(pair.ref_rejected_logps for pair in finite) / generated_tokens
    # what an example adds to the gap beyond its share of the mean; the sum of all is 0
    shares: defaultdict[int, float] = defaultdict(float)
    for pair in finite:
        of_generated = (pair.ref_rejected_logps - generated * len(pair.rejected_ids)) / generated_tokens
        of_human = (pair.ref_chosen_logps - human * len(pair.example.response_ids)) / human_tokens
        shares[pair.example.index] += of_generated - of_human
    values = {"logps_gap": generated - human}
    if (count := len(shares)) > 1:
        squares = math.fsum(share * share for share in shares.values())
        values["logps_gap_error"] = math.sqrt(squares * count / (count - 1))
    return values


def token_overlap(human: Sequence[int], generated: Sequence[int]) -> float:
    """F1 of the two multisets of tokens, in [0, 1], whatever their order; 1 where both are empty."""
    if not human and not generated:
        return 1.0
    shared = (Counter(human) & Counter(generated)).total()
    return 2 * shared / (len(human) + len(generated))


def _without_stop(ids: Sequence[int], stop_ids: frozenset[int]) -> Sequence[int]:
    return ids[:-1] if ids and ids[-1] in stop_ids else ids


# ------------------------------------------------------------------------------------------------ whether to end


def is_reached(metrics: Mapping[str, float], limits: EquilibriumConfig) -> bool:
    """Whether every limit that is given is met; one whose metric is missing, or no number, is not.

    metrics: `equilibrium/*`. False where no limit is given.
    """
    given = {name: limit for name in _LIMITS if (limit := getattr(limits, name)) is not None}
    return bool(given) and all(_is_met(name, metrics.get(PREFIX + name, math.nan), given[name]) for name in given)


def _is_met(name: str, value: float, limit: float) -> bool:
    # comparisons with NaN are false
    if name == "logps_gap":
        return abs(value) <= limit
    return value <= limit if name == "accuracy" else value >= limit


# limit -> how a value of the metric is said, and how the limit is
_LIMITS = {
    "accuracy": ("accuracy {:.3f}", "at most {:g}"),
    "logps_gap": ("logps_gap {:+.4f} nats per token", "at most {:g} from 0"),
    "exact_match": ("exact_match {:.3f}", "at least {:g}"),
    "token_overlap": ("token_overlap {:.3f}", "at least {:g}"),
}


def reason(metrics: Mapping[str, float], limits: EquilibriumConfig, iteration: int) -> str:
    """Why a run ends before an iteration, with each figure and its limit, in one sentence. It has to be reached."""
    parts = [
        f"{said.format(metrics[PREFIX + name])} ({of_limit.format(limit)})"
        for name, (said, of_limit) in _LIMITS.items()
        if (limit := getattr(limits, name)) is not None
    ]
    return f"At equilibrium before iteration {iteration}: {', '.join(parts)}."


def in_words(metrics: Mapping[str, float], iteration: int, pairs: int, held_out: bool) -> str:
    """What was measured at an iteration's start, in one line. pairs: how many; held_out: whether not trained on."""
    values = {name: metrics[PREFIX + name] for name in ("logps_gap", "logps_gap_error") if PREFIX + name in metrics}
    parts = []
    if "logps_gap" in values:
        error = f" +- {values['logps_gap_error']:.3f}" if "logps_gap_error" in values else ""
        parts.append(f"log-probability under the reference {values['logps_gap']:+.3f}{error} nats per token")
    parts.append(f"{metrics[PREFIX + 'exact_match']:.1%} equal to it")
    parts.append(f"overlap of tokens {metrics[PREFIX + 'token_overlap']:.3f}")
    accuracy = ""
    if PREFIX + "accuracy" in metrics:
        value = metrics[PREFIX + "accuracy"]
        chance = f"by chance 0.5 +- {accuracy_error(pairs):.3f}"
        accuracy = f"; told apart in iteration {iteration - 1} with accuracy {value:.3f} ({chance})"
    kind = "held-out" if held_out else "training"
    return (
        f"Iteration {iteration}: the generated response against the human one, on {pairs:,} {kind} pairs: "
        f"{', '.join(parts)}{accuracy}."
    )


def accuracy_error(pairs: int) -> float:
    """Standard error of an accuracy on so many pairs that cannot be told apart."""
    return 0.5 / math.sqrt(pairs)
