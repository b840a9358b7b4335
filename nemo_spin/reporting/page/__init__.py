"""The report of a run: one HTML page with curves, warnings in words and sampled responses, made from its directory.

history.py        metrics.jsonl, and which of its lines count
run_directory.py  the run: history, configuration, checkpoints, how far it came
samples.py        the same few prompts in every iteration's rollouts
findings.py       what is out of the ordinary, in words; all thresholds
figures.py        curves and bars, which figures.yaml describes
tables.py         the run in rows and cells
page.py           the page itself, with page.html.j2, page.css and page.js
"""

from __future__ import annotations

from pathlib import Path

from nemo_spin.reporting.page.findings import find
from nemo_spin.reporting.page.page import render, write_whole
from nemo_spin.reporting.page.run_directory import read_run
from nemo_spin.reporting.page.samples import read_samples

__all__ = ["write_report"]


def write_report(run_dir: Path, output: Path | None = None) -> Path:
    """Write the report of a run that has ended, was interrupted, or is still going on.

    output: where the page goes, `run_dir/report.html` by default. It is written whole or not at all.

    Returns the path of the page. Raises UserError for a directory that is not a run's, a file in it that cannot be
    read, or an output that cannot be written.
    """
    run = read_run(run_dir)
    page = render(run, find(run), read_samples(run.path, run.history.iterations()))
    return write_whole(page, run.path / "report.html" if output is None else output)
