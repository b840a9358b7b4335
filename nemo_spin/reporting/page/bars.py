"""Bars for each iteration: what its responses were like, and where its time went."""

from __future__ import annotations

import math

from nemo_spin.reporting.page.drawing import COLORS, Figure, Spec, layout, to_json
from nemo_spin.reporting.page.history import History

_PATTERNS = ("", "/", ".", "x")
_TIME_UNITS = (("hours", 3600.0), ("minutes", 60.0))

Columns = dict[str, dict[int, float]]  # metric -> iteration -> finite value


def draw(spec: Spec, history: History) -> Figure | None:
    """The values at the end of each iteration's rollouts, times as sums over its lines; None if there are none."""
    unit, columns = _times(spec, history) if spec.key == "time" else (spec.unit, _shares(spec, history))
    traces, words = [], []
    for number, (metric, name) in enumerate(spec.metrics.items()):
        if not (known := columns[metric]):
            continue
        traces.append(
            {
                "type": "bar",
                "name": name,
                "meta": {"metric": metric},
                "x": [f"iteration {i}" for i in known],
                "y": list(known.values()),
                "marker": {"color": COLORS[number], "pattern": {"shape": _PATTERNS[number]}},
                "hovertemplate": "%{y:.4g}",
            }
        )
        words.append(f"{name}: {', '.join(f'{value:.4g} in iteration {i}' for i, value in known.items())}.")
    if not traces:
        return None
    arranged = layout(unit, "") | {"barmode": spec.bars, "bargap": 0.5}
    description = f"{spec.title}, {unit}. {' '.join(words)}"
    return Figure(spec.key, spec.title, spec.caption, description, to_json(traces, arranged))


def _shares(spec: Spec, history: History) -> Columns:
    columns = {metric: {i: history.last(metric, i) for i in history.iterations()} for metric in spec.metrics}
    return {
        metric: {i: value for i, value in column.items() if value is not None and math.isfinite(value)}
        for metric, column in columns.items()
    }


def _times(spec: Spec, history: History) -> tuple[str, Columns]:
    """The unit that suits them, and sums in it."""
    columns = {}
    for metric in spec.metrics:
        series = history.series(metric)
        columns[metric] = {i: sum(values) for i in history.iterations() if (values := series.of(i))}
    longest = max((value for column in columns.values() for value in column.values()), default=0.0)
    unit, seconds = next((pair for pair in _TIME_UNITS if longest >= 2 * pair[1]), (spec.unit, 1.0))
    return unit, {metric: {i: value / seconds for i, value in column.items()} for metric, column in columns.items()}
