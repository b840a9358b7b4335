"""Curves over the steps of a run: every point is a logged one, or a mean that is named so."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

from nemo_spin.reporting.page.drawing import COLORS, Figure, Spec, layout, to_json
from nemo_spin.reporting.page.history import History, Series
from nemo_spin.reporting.page.run_directory import Run

MAX_POINTS = 2000  # of a curve in the page; a longer one keeps the extremes of every stretch
SMOOTHED_FROM = 100  # points from which a curve is drawn as means, over its points in the background
_MARKERS_UP_TO = 40  # points
_MEANS_PER_ITERATION = 40
_MEAN_POINTS = 400
_DASHES = ("solid", "dash", "dot", "dashdot")  # the curves differ also where there are no colours


def draw(spec: Spec, run: Run) -> Figure | None:
    """A figure of those of its metrics that are logged; None if none is."""
    traces: list[dict[str, Any]] = []
    words: list[str] = []
    note = ""
    for number, metric in enumerate(spec.metrics):
        series = run.history.series(metric)
        if not len(series):
            continue
        traces += _traces(metric, series, number, spec)
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


def _level(spec: Spec, run: Run) -> tuple[float, str] | None:
    """(value, label) of the line that marks a level."""
    if isinstance(spec.level, str):
        return getattr(run, spec.level)
    return None if spec.level is None else (spec.level, "")


def _traces(metric: str, series: Series, number: int, spec: Spec) -> Iterator[dict[str, Any]]:
    color, dash = COLORS[number], _DASHES[number]
    drawn = _thinned(series)
    smoothed = spec.smooth and len(series) >= SMOOTHED_FROM
    steps, values = _points(drawn, metric in spec.continuous)
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
        steps, values = _points(means, metric in spec.continuous)
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
