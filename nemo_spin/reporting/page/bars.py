"""Bars for each iteration: what its responses were like, and where its time went."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nemo_spin.reporting.page.drawing import COLORS, Figure, layout, to_json
from nemo_spin.reporting.page.history import History

_PATTERNS = ("", "/", ".", "x")


@dataclass(frozen=True, slots=True)
class Bars:
    """A figure with bars for each iteration. how: stack or group. names: of the metrics in words."""

    key: str
    title: str
    unit: str
    metrics: tuple[str, ...]
    names: tuple[str, ...]
    how: str
    caption: str


SHARES = (
    Bars(
        "finish_reasons",
        "Finish reasons",
        "share of responses",
        ("rollout/finish_reason_stop", "rollout/finish_reason_length"),
        ("stop: ended by itself", "length: cut off"),
        "stack",
        "How the generated responses of an iteration ended. Those cut off have no stop token.",
    ),
    Bars(
        "quality",
        "Generated responses",
        "share of responses",
        ("rollout/empty", "rollout/repeated", "rollout/exact_match"),
        ("empty", "repeating themselves", "equal to the human one"),
        "group",
        "Empty and repetitive ones teach little; those equal to the human one teach nothing.",
    ),
)
TIMES = ("time/rollout", "time/train_step", "time/validation", "time/checkpoint")
_TIME_NAMES = ("rollouts", "training steps", "validation", "checkpoints")


def draw_shares(spec: Bars, history: History) -> Figure | None:
    """The shares at the end of each iteration's rollouts; None if there are none."""
    columns = {metric: {i: history.last(metric, i) for i in history.iterations()} for metric in spec.metrics}
    return _bars(spec, columns)


def draw_times(history: History) -> Figure | None:
    """Sums over each iteration's lines, in the unit that suits them."""
    columns: dict[str, dict[int, float | None]] = {}
    for metric in TIMES:
        series = history.series(metric)
        columns[metric] = {i: sum(values) if (values := series.of(i)) else None for i in history.iterations()}
    longest = max((value for column in columns.values() for value in column.values() if value), default=0.0)
    units = (("hours", 3600.0), ("minutes", 60.0))
    unit, seconds = next((pair for pair in units if longest >= 2 * pair[1]), ("seconds", 1.0))
    scaled = {
        metric: {i: None if value is None else value / seconds for i, value in column.items()}
        for metric, column in columns.items()
    }
    caption = "Where the time of an iteration went: sums of what its lines logged."
    return _bars(Bars("time", "Time", unit, TIMES, _TIME_NAMES, "stack", caption), scaled)


def _bars(spec: Bars, columns: dict[str, dict[int, float | None]]) -> Figure | None:
    traces, words = [], []
    for number, (metric, name) in enumerate(zip(spec.metrics, spec.names, strict=True)):
        known = {i: value for i, value in columns[metric].items() if value is not None and math.isfinite(value)}
        if not known:
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
    arranged = layout(spec.unit, "") | {"barmode": spec.how, "bargap": 0.5}
    return Figure(
        spec.key, spec.title, spec.caption, f"{spec.title}, {spec.unit}. {' '.join(words)}", to_json(traces, arranged)
    )
