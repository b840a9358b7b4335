"""Findings on what the guards of a run watch too (`model.spin.guards`): steps that were skipped, and its rollouts.

The run's own thresholds count, null for never; the defaults where its configuration has none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from nemo_spin.config import GuardsConfig
from nemo_spin.reporting.page.run_directory import Run

_DEFAULTS = GuardsConfig()
EXACT_MATCH = 0.5  # share of responses; no guard of the run

Words = Iterator[tuple[str, str, str]]
"""Title, text, and section of docs/metrics.md."""


def skipped(run: Run) -> Words:
    steps = [record.step for record in run.history.warnings("skipped_step")]
    if steps:
        yield (
            "Skipped steps",
            f"{len(steps):,} of {run.last_position.step:,} steps have changed nothing, because loss or gradient was "
            f"NaN or infinite; the first was step {steps[0]:,}, the last step {steps[-1]:,}.",
            "NaN and infinity",
        )


def left_out(run: Run) -> Words:
    if shares := _high_shares(run, "rollout/not_finite", math.ulp(0.0), ".2%"):
        yield (
            "Pairs that could not be trained on",
            f"The reference's log-probabilities of {shares} of the pairs are NaN or infinite.",
            "NaN and infinity",
        )


def rollouts(run: Run) -> Words:
    cut_off, empty, repeated = (_guard(run, key) for key in ("cut_off", "empty", "repeated"))
    shares = (
        ("rollout/finish_reason_length", cut_off, "Responses cut off", "ran into the length limit", "finish reasons"),
        ("rollout/empty", empty, "Empty responses", "have no token but the stop token", "empty and repeated"),
        ("rollout/repeated", repeated, "Repetitive responses", "repeat themselves", "empty and repeated"),
        ("rollout/exact_match", EXACT_MATCH, "Little left to learn", "equal the human ones", "exact_match"),
    )
    for name, limit, title, what, section in shares:
        if limit is not None and (listed := _high_shares(run, name, limit)):
            yield (title, f"Of the generated responses {listed} {what}.", section)


def certain(run: Run) -> Words:
    limit = _guard(run, "entropy")
    if limit is None or run.get("model.spin.sampling_params.use_greedy"):
        return
    values = {iteration: run.history.last("rollout/entropy", iteration) for iteration in run.history.iterations()}
    if run.get("model.spin.first_rollouts_from_data"):
        values.pop(0, None)
    low = [f"{value:.2g} in iteration {i}" for i, value in values.items() if value is not None and value < limit]
    if low:
        yield (
            "The policy hardly varies its responses",
            f"The entropy of the generated responses is {', '.join(low)}, in nats per token.",
            "rollout/entropy",
        )


def _guard(run: Run, key: str) -> float | None:
    """A threshold of the run's guards; None where it is switched off."""
    guards = run.get("model.spin.guards", {})
    if isinstance(guards, dict) and key in guards:
        return run.number(f"model.spin.guards.{key}")
    return getattr(_DEFAULTS, key)


def _high_shares(run: Run, name: str, limit: float, form: str = ".1%") -> str:
    """The iterations in which a share of the responses is at least the limit, in words."""
    by_iteration = {iteration: run.history.last(name, iteration) for iteration in run.history.iterations()}
    high = {iteration: share for iteration, share in by_iteration.items() if share is not None and share >= limit}
    return ", ".join(f"{share:{form}} in iteration {iteration}" for iteration, share in high.items())
