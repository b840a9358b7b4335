"""docs/study.md, written from the figures; and its table of verdicts for the terminal."""

from __future__ import annotations

import textwrap

import writing
from claims import Claim, claims
from evidence import Study

_HEAD = """# A study of SPIN

Written by `make study` (`examples/study/`) from the figures of its runs; nothing here is written by hand but the
reasons, which come from the runs for tuning or were given after these results had been seen, and which no run of their
own has tested. It takes half an hour on two cores; `make study STUDY_ARGS=--full` is for a GPU (not tried) or a night.
"""


def summary(study: Study) -> str:
    """For the terminal."""
    found = claims(study)
    width = max(len(claim.verdict) for claim in found)
    lines = [f"{claim.verdict:>{width}}  {claim.section}: {claim.title}" for claim in found]
    lines += [f"FAILED RUN: {failure}" for failure in study.failures]
    return "\n".join([*lines, "", writing.introduction(study)[-1]])


def document(study: Study) -> str:
    found = claims(study)
    parts = [_HEAD, *map(_wrapped, writing.introduction(study)), "## Verdicts\n"]
    parts.append(_table(["claim", "where", "verdict"], [[c.title, c.section, f"**{c.verdict}**"] for c in found]))
    if study.failures:
        parts += ["## Runs that failed\n", "\n".join(f"- {failure}" for failure in study.failures) + "\n"]
    for section in dict.fromkeys(claim.section for claim in found):
        parts.append(f"## {section}\n")
        parts += [_claim(claim) for claim in found if claim.section == section]
    parts.append("## All figures\n")
    for title, columns, rows in writing.all_figures(study):
        parts += [f"{title}.\n", _table(columns, rows)]
    return "\n".join(parts)


def _claim(claim: Claim) -> str:
    lines = [
        f"### {claim.title}: {claim.verdict}\n",
        _wrapped(f"The paper: {claim.paper}"),
        _wrapped(f"Here: {claim.here}"),
    ]
    if claim.reason:
        lines.append(_wrapped(f"Why: {claim.reason}"))
    columns = ["comparison", "this", "other", "difference (95% interval)", "seeds", "verdict"]
    return "\n".join([*lines, _table(columns, writing.comparisons(claim))])


def _wrapped(paragraph: str) -> str:
    return textwrap.fill(paragraph, 120, break_long_words=False, break_on_hyphens=False) + "\n"


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"
