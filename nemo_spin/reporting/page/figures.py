"""All figures of a run, in the order of the page, as figures.yaml describes them."""

from __future__ import annotations

from pathlib import Path

import yaml

from nemo_spin.reporting.page import bars, curves
from nemo_spin.reporting.page.drawing import Figure, Spec
from nemo_spin.reporting.page.run_directory import Run

SPECS = [Spec(**values) for values in yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))]

DRAWN = {metric for spec in SPECS for metric in spec.metrics}
"""Metrics that are in a figure if they are logged."""


def figures(run: Run) -> list[Figure]:
    """The figures for which the run has logged something."""
    drawn = (bars.draw(spec, run.history) if spec.bars else curves.draw(spec, run) for spec in SPECS)
    return [figure for figure in drawn if figure is not None]
