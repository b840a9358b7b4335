"""What is out of the ordinary in a run, in words. Every threshold stands at the top of this file.

What the guards of a run watch as well is in `guard_findings.py`.
The thresholds are ours, set where we would look twice; docs/metrics.md says what each finding means.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from statistics import fmean, median

from nemo_spin.reporting.page import guard_findings
from nemo_spin.reporting.page.history import History
from nemo_spin.reporting.page.run_directory import Run

FIRST_LOSS_TOLERANCE = 0.05  # first loss of an iteration: bf16 rounds long responses by less
MIN_STEPS = 10  # an iteration with fewer training lines is not judged by its curves
PART = 0.1  # of an iteration's lines: what "at its beginning" and "at its end" mean
FALLING_SHARE = 0.1  # the chosen reward falls by this share of what the margin gained
FALLING_LOGPS = 0.05  # the same from logps/chosen, relative to where they began: batches differ by some per cent
ACCURACY_NEAR_1 = 0.98
EARLY = 0.5  # of an iteration's steps, of one under way those that it has made
STILL_LOSS = 0.02  # below where it began, at the end of an iteration
STILL_ACCURACY = 0.55
LARGE_KL_PER_TOKEN = 0.2  # nats per token of a rejected response
LARGE_KL = 50.0  # nats per response, where its length is not logged
VAL_LOSS_RISE = 0.02  # relative, from one iteration to the next
OVERFITTING_GAP = 0.15  # training accuracy above the accuracy on held-out rollouts
SPIKE = 10.0  # times the median gradient norm of the iteration
SPIKES_SHARE = 0.01  # of the steps, and at least SPIKES_COUNT
SPIKES_COUNT = 3
CLIPPED_SHARE = 0.95  # of the steps


@dataclass(frozen=True, slots=True)
class Finding:
    """A warning. check: its name here. title, text: words. section: of docs/metrics.md."""

    check: str
    title: str
    text: str
    section: str


Check = Callable[[Run], Iterator[tuple[str, str, str]]]


def find(run: Run) -> list[Finding]:
    """All warnings, what matters most first."""
    return [Finding(check.__name__.strip("_"), *words) for check in _CHECKS for words in check(run)]


# ------------------------------------------------------------------------------------------------ the run as a whole


def _unfinished(run: Run) -> Iterator[tuple[str, str, str]]:
    if not run.is_finished:
        going_on = "The last line of metrics.jsonl ends it" if run.has_ended else "It may still be going on"
        yield (
            "The run is not finished",
            f"{run.state[0].upper() + run.state[1:]}. {going_on}; what follows is what there is so far.",
            "Unfinished runs",
        )


def _not_finite(run: Run) -> Iterator[tuple[str, str, str]]:
    found = [
        (record.step, name)
        for record in run.history.records
        for name, value in record.metrics.items()
        if not math.isfinite(value)
    ]
    if found:
        step, name = min(found)
        values = "value is" if len(found) == 1 else "values are"
        yield (
            "Values that are not numbers",
            f"{len(found):,} logged {values} NaN or infinite, first {name} at step {step:,}.",
            "NaN and infinity",
        )


def _first_loss(run: Run) -> Iterator[tuple[str, str, str]]:
    for record in run.history.records:
        loss = record.metrics.get(run.spin_loss, math.nan)
        is_first = record.kind == "train" and record.position.get("iteration_step", 0) == 1
        level, name = run.loss_at_margin_0
        if is_first and run.begins_at_reference(record.iteration) and abs(loss - level) > FIRST_LOSS_TOLERANCE:
            yield (
                f"Iteration {record.iteration} did not begin at {name}",
                f"Its first loss is {loss:.4f}. There policy and reference are the same, so it has to be {level:.4f}.",
                "loss",
            )


# ----------------------------------------------------------------------------------------------- training's curves


def _falling_chosen(run: Run) -> Iterator[tuple[str, str, str]]:
    warned = {record.iteration: record.notes["text"] for record in run.history.warnings("falling_chosen")}
    for iteration in _judged(run.history):
        if text := _fall(run.history, iteration) or warned.get(iteration):
            yield f"Human responses became less likely in iteration {iteration}", text, "logps/chosen falls"


def _fall(history: History, iteration: int) -> str | None:
    """By how much the chosen reward fell from an iteration's beginning to its end, if the margin gained by it."""
    gained = _change(history, "rewards/margins", iteration)
    reward = _change(history, "rewards/chosen", iteration)
    ends = _ends(history, "logps/chosen", iteration)
    if gained is None or gained <= 0:
        return None
    if reward is not None:
        falls = reward < -FALLING_SHARE * gained
    else:
        falls = ends is not None and ends[1] - ends[0] < -FALLING_LOGPS * abs(ends[0])
    logps = f", logps/chosen from {ends[0]:.4g} to {ends[1]:.4g} nats" if ends else ""
    rewards = f"rewards/chosen changed by {reward:+.3g}" if reward is not None else "rewards/chosen is not logged"
    return f"The margin grew by {gained:.3g} while {rewards}{logps}." if falls else None


def _early_accuracy(run: Run) -> Iterator[tuple[str, str, str]]:
    for iteration in _judged(run.history):
        accuracies = run.history.series("rewards/accuracies").of(iteration)
        window, steps = _part(accuracies), len(accuracies)
        sums = list(accumulate(accuracies, initial=0.0))
        ends = range(window, int(EARLY * steps) + 1)
        early = next((end for end in ends if sums[end] - sums[end - window] >= ACCURACY_NEAR_1 * window), None)
        if early is not None:
            so_far = " so far" if _is_under_way(run, iteration) else ""
            yield (
                f"Accuracy near 1 early in iteration {iteration}",
                f"After {early:,} of {steps:,} steps{so_far} the policy tells almost all pairs of a batch apart "
                f"(at least {ACCURACY_NEAR_1:.0%}): later steps teach it little but the training data.",
                "rewards/accuracies",
            )


def _standing_still(run: Run) -> Iterator[tuple[str, str, str]]:
    for iteration in _judged(run.history):
        if _is_under_way(run, iteration):
            continue  # it still may move
        loss, accuracy = (_ends(run.history, name, iteration) for name in (run.spin_loss, "rewards/accuracies"))
        level, name = run.loss_at_margin_0
        if loss is None or loss[1] < level - STILL_LOSS or (accuracy is not None and accuracy[1] > STILL_ACCURACY):
            continue
        above = loss[1] > level + STILL_LOSS
        at_start = name if name == f"{level:g}" else f"{name} = {level:.4f}"
        yield (
            f"Iteration {iteration} {'got worse' if above else 'did not move'}",
            f"The loss at its end is {loss[1]:.4f}, "
            + (
                f"above {at_start}: the policy prefers the generated responses. The steps are too large."
                if above
                else f"still near {at_start}: the learning rate or beta is too small, or there is nothing to learn."
            ),
            "rewards/margins",
        )


def _large_kl(run: Run) -> Iterator[tuple[str, str, str]]:
    for iteration in _judged(run.history):
        kl, tokens = (_ends(run.history, name, iteration) for name in ("kl", "tokens/rejected"))
        limit = LARGE_KL if tokens is None else LARGE_KL_PER_TOKEN * tokens[1]
        if kl is not None and kl[1] > limit:
            yield (
                f"The policy went far from its reference in iteration {iteration}",
                f"The estimated KL divergence at its end is {kl[1]:.4g} nats per response"
                + (f" of {tokens[1]:.4g} tokens." if tokens else "."),
                "kl",
            )


def _gradients(run: Run) -> Iterator[tuple[str, str, str]]:
    for iteration in _judged(run.history):
        norms = run.history.series("grad_norm").of(iteration)
        if len(norms) < MIN_STEPS:
            continue
        typical = median(norms)
        spikes = sum(norm > SPIKE * typical for norm in norms)
        if spikes >= max(SPIKES_COUNT, SPIKES_SHARE * len(norms)):
            yield (
                f"Gradient spikes in iteration {iteration}",
                f"{spikes:,} of {len(norms):,} steps had a gradient norm above {SPIKE:.0f} times the median "
                f"({typical:.3g}); the largest was {max(norms):.3g}.",
                "grad_norm",
            )
        limit = run.number("trainer.spin.gradient_clip_val") or 0.0
        clipped = sum(norm > limit for norm in norms) / len(norms)
        if limit > 0 and clipped >= CLIPPED_SHARE:
            yield (
                f"Nearly every step of iteration {iteration} was clipped",
                f"The gradient norm was above trainer.spin.gradient_clip_val = {limit:g} in {clipped:.0%} of the steps "
                f"(median {typical:.3g}).",
                "grad_norm",
            )


# ------------------------------------------------------------------------------------------- validation and rollouts


def _rising_val_loss(run: Run) -> Iterator[tuple[str, str, str]]:
    series = run.history.series("val_loss")
    at_start = [value for step, value in series.finite() if step == 0][:1]
    after = [(iteration, values[-1]) for iteration in run.history.iterations() if (values := series.of(iteration))]
    ends = [("before training", value) for value in at_start]
    ends += [(f"after iteration {iteration}", value) for iteration, value in after]
    rises = [
        f"{before[1]:.4f} {before[0]}, {now[1]:.4f} {now[0]}"
        for before, now in pairwise(ends)
        if now[1] > before[1] * (1 + VAL_LOSS_RISE)
    ]
    if rises:
        yield (
            "The validation loss rises from iteration to iteration",
            f"val_loss was {'; '.join(rises)}.",
            "val_loss",
        )


def _overfitting(run: Run) -> Iterator[tuple[str, str, str]]:
    for iteration in _judged(run.history):
        held_out = run.history.series("val/rewards/accuracies").of(iteration)
        training = _ends(run.history, "rewards/accuracies", iteration)
        if held_out and training and training[1] - held_out[-1] > OVERFITTING_GAP:
            yield (
                f"Iteration {iteration} tells its own pairs apart better than held-out ones",
                f"Accuracy at its end: {training[1]:.1%} on training pairs, {held_out[-1]:.1%} on held-out rollouts.",
                "val/loss, val/rewards/margins, val/rewards/accuracies",
            )


_CHECKS: tuple[Check, ...] = (
    _not_finite,
    guard_findings.skipped,
    guard_findings.left_out,
    _first_loss,
    _unfinished,
    _falling_chosen,
    _standing_still,
    guard_findings.certain,
    _large_kl,
    _early_accuracy,
    _overfitting,
    _rising_val_loss,
    guard_findings.rollouts,
    _gradients,
)

# ------------------------------------------------------------------------------------------------------------ helpers


def _judged(history: History) -> list[int]:
    """Iterations that are long enough to be judged by their curves."""
    steps = [record.iteration for record in history.records if record.kind == "train"]
    return [iteration for iteration in sorted(set(steps)) if steps.count(iteration) >= MIN_STEPS]


def _is_under_way(run: Run, iteration: int) -> bool:
    return iteration == run.last_position.iteration and not run.is_finished


def _part(values: list[float]) -> int:
    return max(1, round(PART * len(values)))


def _ends(history: History, name: str, iteration: int) -> tuple[float, float] | None:
    """Means of a metric over the beginning and the end of an iteration, None where it is not logged."""
    values = history.series(name).of(iteration)
    return (fmean(values[: _part(values)]), fmean(values[-_part(values) :])) if values else None


def _change(history: History, name: str, iteration: int) -> float | None:
    ends = _ends(history, name, iteration)
    return None if ends is None else ends[1] - ends[0]
