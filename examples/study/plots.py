"""The figures of the report: means over seeds, with their standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from evidence import SFT_MODEL, Study
from tasks import C2ST, KL, NLL, Figure

from nemo_spin.reporting.page.drawing import COLORS, layout, to_json
from nemo_spin.reporting.page.drawing import Figure as Plot

_COLORS = (*COLORS, "#c0504d", "#6b7a8a", "#b0a020", "#d472b0")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_ACCURACY = Figure("accuracy", "sampled answers that are right", "higher")


def plots(study: Study) -> list[Plot]:
    """All figures that the runs have something for."""
    scale = study.scale
    betas = [(beta, "SPIN" if beta == 5.0 else f"beta {beta:g}") for beta in sorted({*scale.betas, 5.0})]
    main = ("SPIN", "further SFT", "further SFT, low lr")
    last = scale.iterations - 1
    longer = [f"iteration 0 as long as 0 to {i}" for i in sorted({1, last})]
    few = [
        f"{kind} on {size}{lr}" for size in scale.few for kind, lr in (("SPIN", ""), ("SFT", ""), ("SFT", ", low lr"))
    ]
    found = [
        _language(study),
        _by_steps(study, "iterations", "Self-play and further SFT", main, _ACCURACY),
        _by_steps(study, "iterations c2st", "Can a classifier tell?", main, C2ST),
        _by_steps(study, "iterations nll", "NLL of right answers", main, NLL),
        _by_steps(
            study,
            "controls",
            "What makes it self-play",
            ("SPIN", "no refresh", "no mixing", "no mixing, equal steps", "two responses", *longer, "rmsprop"),
            _ACCURACY,
        ),
        _by_value(
            study,
            "data",
            "Data sizes, iteration 0",
            "examples",
            [(s, f"data {s}") for s in scale.sizes],
            [0],
            _ACCURACY,
        ),
        _by_value(study, "beta", "Betas", "beta", betas, sorted({0, last}), _ACCURACY),
        _by_value(study, "beta kl", "How far a policy moves in iteration 0", "beta", betas, [0], KL),
        _by_steps(
            study,
            "losses",
            "Losses",
            ("SPIN", *(f"loss {x}" for x in ("hinge", "exponential", "correlation"))),
            _ACCURACY,
        ),
        _by_steps(study, "limited", "Limited data", few, _ACCURACY),
        _by_steps(
            study, "sizes", "Model sizes", ["SPIN" if s == "base" else f"SPIN, {s}" for s in scale.shapes], _ACCURACY
        ),
    ]
    if study.has_gsm8k:
        figures = {figure.key: figure for figure in study.known["gsm8k"].figures}
        text = ("gsm8k: SPIN", "gsm8k: further SFT", "gsm8k: further SFT, low lr")
        found += [
            _by_steps(study, "text c2st", "GSM8K: can a classifier tell?", text, C2ST),
            _by_steps(study, "text nll", "GSM8K: NLL", text, NLL),
            _by_steps(study, "text equations", "GSM8K: right equations", text, figures["equations"]),
            _by_steps(study, "text form", "GSM8K: form", text, figures["well_formed"]),
        ]
    return [plot for plot in found if plot is not None]


def _by_steps(study: Study, key: str, title: str, variants: Sequence[str], figure: Figure) -> Plot | None:
    """Figures after each iteration, over optimizer steps: so is what costs as much beside each other."""
    series = []
    for name in variants:
        points = []
        for iteration in study.iterations(name):
            rows = [row for seed in study.results[name] if (row := study.row(name, seed, iteration)) is not None]
            steps = 0 if iteration == SFT_MODEL else rows[0].step if rows else 0
            points.append((steps, study.estimate(name, iteration, figure.key)))
        if points:
            series.append((study.variants[name].label, points))
    return _plot(key, title, figure.label, "optimizer steps", series)


def _by_value(
    study: Study,
    key: str,
    title: str,
    axis: str,
    variants: Sequence[tuple[float, str]],
    iterations: Sequence[int],
    figure: Figure,
) -> Plot | None:
    series = [
        (f"after iteration {i}", [(value, study.estimate(name, i, figure.key)) for value, name in variants])
        for i in iterations
    ]
    plot = _plot(key, title, figure.label, axis, series, logarithmic=True)
    return plot


def _language(study: Study) -> Plot | None:
    series = []
    names = [name for name in study.variants if name.startswith("language: ")]
    for name in names:
        label = study.variants[name].label
        series.append((label, [(i + 1, study.estimate(name, i, "kl")) for i in study.iterations(name)]))
    for name in names:
        if name in ("language: beta 2", "language: beta 4"):
            predicted = [(i + 1, study.estimate(name, i, "way")) for i in study.iterations(name)]
            series.append((f"{study.variants[name].label}, Theorem 5.4", predicted))
    if names:
        floors = [(i + 1, study.estimate(names[0], i, "floor")) for i in study.iterations(names[0])]
        series.append(("by counting", floors))
    return _plot(
        "language",
        "KL(data || policy) in the language",
        "nats per response",
        "iterations played",
        series,
        logarithmic_y=True,
    )


def _plot(
    key: str,
    title: str,
    y_title: str,
    x_title: str,
    series: Sequence[tuple[str, Sequence[tuple[float, Any]]]],
    logarithmic: bool = False,
    logarithmic_y: bool = False,
) -> Plot | None:
    traces, words = [], []
    for number, (label, points) in enumerate(series):
        known = [(x, estimate) for x, estimate in points if math.isfinite(estimate.mean)]
        if not known:
            continue
        color = _COLORS[number % len(_COLORS)]
        errors = [0.0 if math.isnan(estimate.error) else estimate.error for _, estimate in known]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": label,
                "x": [x for x, _ in known],
                "y": [estimate.mean for _, estimate in known],
                "error_y": {"type": "data", "array": errors, "thickness": 1.2, "width": 3, "color": color},
                "line": {"color": color, "dash": _DASHES[number % len(_DASHES)]},
                "marker": {"color": color},
                "hovertemplate": "%{y:.4g}",
            }
        )
        words.append(f"{label}: {', '.join(f'{estimate.mean:.4g} at {x:g}' for x, estimate in known)}.")
    if not traces:
        return None
    arranged = layout(y_title, x_title) | {"height": 380}
    if logarithmic:
        arranged["xaxis"] |= {"type": "log", "tickvals": sorted({x for trace in traces for x in trace["x"]})}
    if logarithmic_y:
        arranged["yaxis"] |= {"type": "log"}
    caption = "Means over seeds, with standard errors."
    return Plot(key.replace(" ", "-"), title, caption, f"{title}. {' '.join(words)}", to_json(traces, arranged))
