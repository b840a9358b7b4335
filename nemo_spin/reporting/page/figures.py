"""All figures of a run, in the order of the page."""

from __future__ import annotations

from nemo_spin.reporting.page import bars, curves
from nemo_spin.reporting.page.drawing import Figure
from nemo_spin.reporting.page.run_directory import Run

_ORDER = (
    "loss margins rewards logps accuracies kl val_loss logps_gap equilibrium lengths finish_reasons quality "
    "grad_norm lr throughput memory time"
).split()

DRAWN = {metric for spec in (*curves.CURVES, *bars.SHARES) for metric in spec.metrics} | set(bars.TIMES)
"""Metrics that are in a figure if they are logged."""


def figures(run: Run) -> list[Figure]:
    """The figures for which the run has logged something."""
    found = [curves.draw(spec, run) for spec in curves.CURVES]
    found += [bars.draw_shares(spec, run.history) for spec in bars.SHARES]
    found.append(bars.draw_times(run.history))
    return sorted((figure for figure in found if figure is not None), key=lambda figure: _ORDER.index(figure.key))
