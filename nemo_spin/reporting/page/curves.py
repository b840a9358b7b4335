"""Curves over the steps of a run: every point is a logged one, or a mean that is named so."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from nemo_spin.reporting.page.drawing import COLORS, Figure, layout, to_json
from nemo_spin.reporting.page.history import History, Series
from nemo_spin.reporting.page.run_directory import Run

MAX_POINTS = 2000  # of a curve in the page; a longer one keeps the extremes of every stretch
SMOOTHED_FROM = 100  # points from which a curve is drawn as means, over its points in the background
_MARKERS_UP_TO = 40  # points
_MEANS_PER_ITERATION = 40
_MEAN_POINTS = 400

# metrics that go on from one iteration to the next; the others begin anew
_RUN_ON = {"val_loss", "rollout/length", "throughput/rollout_tokens_per_second"} | {
    f"equilibrium/{name}" for name in ("logps_gap", "accuracy", "exact_match", "token_overlap")
}
_DASHES = ("solid", "dash", "dot", "dashdot")  # the curves differ also where there are no colours


@dataclass(frozen=True, slots=True)
class Curves:
    """A figure over the steps.

    caption: what to see in it. line: a level that is marked. noisy: whether means help. errors: the metric that is the
    standard error of the first one.
    """

    key: str
    title: str
    unit: str
    metrics: tuple[str, ...]
    caption: str
    line: tuple[float, str] | None = None
    noisy: bool = True
    errors: str | None = None


CURVES = (
    Curves(
        "loss",
        "Loss",
        "nats",
        ("loss", "spin_loss", "sft_loss", "val/loss"),
        "Every iteration begins at the level that is marked, where policy and reference are the same, and falls as it "
        "learns.",
    ),
    Curves(
        "margins",
        "Margins",
        "beta x nats",
        ("rewards/margins", "val/rewards/margins"),
        "Reward of the human response minus reward of the generated one. It should grow.",
        (0.0, ""),
    ),
    Curves(
        "rewards",
        "Rewards",
        "beta x nats",
        ("rewards/chosen", "rewards/rejected"),
        "beta times the change of a response's log-probability since the iteration began. The distance counts; "
        "a chosen reward below 0 means that human responses became less likely.",
        (0.0, ""),
    ),
    Curves(
        "logps",
        "Log-probabilities",
        "nats per response",
        ("logps/chosen", "logps/rejected"),
        "Of whole responses under the policy. Longer responses have lower ones.",
    ),
    Curves(
        "accuracies",
        "Accuracy",
        "share of pairs",
        ("rewards/accuracies", "val/rewards/accuracies"),
        "Pairs whose margin is positive. It begins at 0.5; near 1 there is nothing left to learn.",
        (0.5, ""),
    ),
    Curves(
        "kl",
        "KL estimate",
        "nats per response",
        ("kl",),
        "How far the policy has gone from the reference of its iteration, estimated on the generated responses.",
        (0.0, ""),
    ),
    Curves(
        "val_loss",
        "Validation loss",
        "nats per token",
        ("val_loss",),
        "Mean negative log-likelihood of a human response token on held-out data.",
    ),
    Curves(
        "logps_gap",
        "Gap to the data",
        "nats per token",
        ("equilibrium/logps_gap",),
        "By how much more likely its own responses are under the reference than human ones, at each iteration's start, "
        "with one standard error. Towards 0 is nearer to the data.",
        (0.0, ""),
        noisy=False,
        errors="equilibrium/logps_gap_error",
    ),
    Curves(
        "equilibrium",
        "Likeness to the data",
        "share",
        ("equilibrium/accuracy", "equilibrium/exact_match", "equilibrium/token_overlap"),
        "At each iteration's start: how well the policy told human from generated held-out responses in the iteration "
        "before (0.5: not at all), generated responses equal to the human one, and the overlap of their tokens.",
        (0.5, ""),
        noisy=False,
    ),
    Curves(
        "lengths",
        "Response lengths",
        "tokens",
        ("tokens/chosen", "tokens/rejected", "rollout/length"),
        "Human and generated responses in training batches, and the mean of all generated ones.",
    ),
    Curves(
        "grad_norm",
        "Gradient norm",
        "2-norm",
        ("grad_norm",),
        "Before clipping.",
    ),
    Curves("lr", "Learning rate", "", ("lr",), "Of each step.", noisy=False),
    Curves(
        "throughput",
        "Throughput",
        "tokens per second",
        ("throughput/train_tokens_per_second", "throughput/rollout_tokens_per_second"),
        "Of the whole run, not of one device.",
    ),
    Curves("memory", "Memory", "GiB", ("memory/peak_gib",), "Peak of a device.", noisy=False),
)


def draw(spec: Curves, run: Run) -> Figure | None:
    """A figure of those of its metrics that are logged; None if none is."""
    traces: list[dict[str, Any]] = []
    words: list[str] = []
    note = ""
    for number, metric in enumerate(spec.metrics):
        series = run.history.series(metric)
        if not len(series):
            continue
        traces += _traces(metric, series, number, spec.noisy)
        if spec.errors and number == 0:
            errors = dict(run.history.series(spec.errors).finite())
            array = [errors.get(step, 0.0) for step in traces[-1]["x"]]
            traces[-1]["error_y"] = {"type": "data", "array": array}
        words.append(_in_words(metric, series))
        if len(series) > MAX_POINTS:
            kept = len(_thinned(series))
            note = f" Shown are {kept:,} of {len(series):,} points, the extremes of every stretch."
    if not traces:
        return None
    arranged = layout(spec.unit, "optimizer step") | _marks(run.history, _level(spec, run))
    arranged["hovermode"] = "x unified"
    text = spec.caption + note
    return Figure(
        spec.key, spec.title, text, f"{spec.title} over optimizer steps. {' '.join(words)}", to_json(traces, arranged)
    )


def _level(spec: Curves, run: Run) -> tuple[float, str] | None:
    if spec.key == "loss":
        return run.loss_at_margin_0
    if spec.key == "grad_norm":
        limit = run.number("trainer.spin.gradient_clip_val") or 0.0
        return (limit, "clipped above") if limit > 0 else None
    return spec.line


def _traces(metric: str, series: Series, number: int, noisy: bool) -> Iterator[dict[str, Any]]:
    color, dash = COLORS[number], _DASHES[number]
    drawn = _thinned(series)
    smoothed = noisy and len(series) >= SMOOTHED_FROM
    steps, values = _points(drawn, metric in _RUN_ON)
    few = len(series) <= _MARKERS_UP_TO
    yield {
        "type": "scatter",
        "name": metric,
        "meta": {"metric": metric},
        "x": steps,
        "y": values,
        "mode": "lines+markers" if few else "lines",
        "line": {"color": color, "width": 1 if smoothed else 2, "dash": "solid" if smoothed else dash},
        "marker": {"size": 6},
        "opacity": 0.35 if smoothed else 1,
        "legendgroup": metric,
        "showlegend": not smoothed,
        "hovertemplate": "%{y:.5g}",
    }
    if smoothed:
        means = _means(series)
        steps, values = _points(means, metric in _RUN_ON)
        yield {
            "type": "scatter",
            "name": f"{metric}, mean",
            "x": steps,
            "y": values,
            "mode": "lines",
            "line": {"color": color, "width": 2.5, "dash": dash},
            "legendgroup": metric,
            "hovertemplate": "%{y:.5g}",
        }


def _by_iteration(series: Series) -> Iterator[Series]:
    start = 0
    for end in range(1, len(series) + 1):
        if end == len(series) or series.iterations[end] != series.iterations[start]:
            yield Series(series.steps[start:end], series.values[start:end], series.iterations[start:end])
            start = end


def _thinned(series: Series) -> Series:
    """The smallest and the largest value of every stretch, and both ends, when there are more than MAX_POINTS."""
    if len(series) <= MAX_POINTS:
        return series
    stretch = math.ceil(2 * len(series) / (MAX_POINTS - 2))
    kept = {0, len(series) - 1}
    for start in range(0, len(series), stretch):
        finite = [i for i in range(start, min(start + stretch, len(series))) if math.isfinite(series.values[i])]
        if finite:
            kept |= {min(finite, key=series.values.__getitem__), max(finite, key=series.values.__getitem__)}
        else:
            kept.add(start)
    return _at(series, sorted(kept))


def _means(series: Series) -> Series:
    """Means around points, over a part of their iteration; they begin with its first point alone."""
    means = Series()
    for part in _by_iteration(series):
        half = max(1, len(part) // (2 * _MEANS_PER_ITERATION))
        finite = [math.isfinite(value) for value in part.values]
        sums = list(accumulate((v if f else 0.0 for v, f in zip(part.values, finite, strict=True)), initial=0.0))
        counts = list(accumulate(finite, initial=0))
        every = max(1, len(series) // _MEAN_POINTS)
        for i in sorted({*range(0, len(part), every), len(part) - 1}):
            reach = min(half, i)
            low, high = i - reach, min(i + reach + 1, len(part))
            count = counts[high] - counts[low]
            means.steps.append(part.steps[i])
            means.values.append((sums[high] - sums[low]) / count if count else math.nan)
            means.iterations.append(part.iterations[i])
    return means


def _at(series: Series, positions: Sequence[int]) -> Series:
    return Series(
        [series.steps[i] for i in positions],
        [series.values[i] for i in positions],
        [series.iterations[i] for i in positions],
    )


def _points(series: Series, runs_on: bool) -> tuple[list[int], list[float | None]]:
    """Steps and values, with a gap for what is no number, and one where an iteration begins anew unless it runs on."""
    steps: list[int] = []
    values: list[float | None] = []
    for part in _by_iteration(series):
        if steps and not runs_on:
            steps.append(part.steps[0])
            values.append(None)
        steps += part.steps
        values += [value if math.isfinite(value) else None for value in part.values]
    return steps, values


def _in_words(metric: str, series: Series) -> str:
    points = series.finite()
    if not points:
        return f"{metric} has no value that is a number."
    (first, begin), (last, end) = points[0], points[-1]
    low, high = min(value for _, value in points), max(value for _, value in points)
    return (
        f"{metric}: {begin:.4g} at step {first:,}, {end:.4g} at step {last:,}; between {low:.4g} and {high:.4g} "
        f"in {len(points):,} points."
    )


def _marks(history: History, level: tuple[float, str] | None) -> dict[str, Any]:
    """Where iterations begin, and the level, as lines with labels."""
    shapes: list[dict[str, Any]] = []
    labels: list[dict[str, Any]] = []
    starts = {}
    for record in history.records:
        if record.kind == "train":
            starts.setdefault(record.iteration, record.step - 1)
    # more labels than these would run into each other
    every = max(1, math.ceil(len(starts) / 6))
    for number, (iteration, start) in enumerate(starts.items()):
        line = {"color": "#888", "width": 1, "dash": "dot"}
        shapes.append({"type": "line", "x0": start, "x1": start, "yref": "paper", "y0": 0, "y1": 1, "line": line})
        if number % every == 0:
            where = {"x": start, "xanchor": "left", "yref": "paper", "y": 1, "yanchor": "bottom", "showarrow": False}
            labels.append(where | {"text": f"iteration {iteration}" if number == 0 else str(iteration)})
    if level is not None:
        value, name = level
        line = {"color": "#888", "width": 1.5, "dash": "dash"}
        shapes.append({"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": value, "y1": value, "line": line})
        if name:
            where = {"xref": "paper", "x": 1, "xanchor": "right", "y": value, "yanchor": "bottom", "showarrow": False}
            labels.append(where | {"text": name})
    return {"shapes": shapes, "annotations": labels}
