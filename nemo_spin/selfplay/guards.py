"""Signs that a model collapses, as pure functions of what a run measures. Thresholds: `model.spin.guards`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from nemo_spin.config import GuardsConfig
from nemo_spin.reporting.events import GuardWarning

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


def rollout_warnings(
    summary: Mapping[str, float], iteration: int, guards: GuardsConfig, are_samples: bool
) -> list[GuardWarning]:
    """Of an iteration's responses, from their `rollout/*` metrics.

    are_samples: they were drawn from the reference, so that its certainty about them is its entropy.
    """
    number = round(summary["rollout/responses"])
    found = []
    for guard, (metric, what, advice) in _SHARES.items():
        limit, share = getattr(guards, guard), summary[metric]
        if limit is not None and share >= limit and round(share * number) >= _FEWEST:
            text = (
                f"{share:.1%} of the {number:,} generated responses of iteration {iteration} {what} "
                f"(model.spin.guards.{guard}: {limit:.4g}): {advice}."
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
