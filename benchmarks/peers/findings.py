"""What was measured, as lines with medians, ratios and bars. Standard library only."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True)
class Line:
    """A figure of both sides.

    ratio: how many times better ours is. bar: what it should be at least; None where nothing is asked for.
    against: which peer.
    """

    workload: str
    what: str
    unit: str
    ours: float
    theirs: float | None
    ratio: float | None
    bar: float | None = None
    against: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the bar is reached; of a figure that has no ratio, whether ours is at least the bar."""
        if self.bar is None:
            return None
        return (self.ours if self.ratio is None else self.ratio) >= self.bar

    def cells(self) -> list[str]:
        verdict = {None: "", True: "met", False: "MISSED"}[self.met]
        return [
            self.workload,
            self.what,
            self.unit,
            _number(self.ours),
            "" if self.theirs is None else _number(self.theirs),
            "" if self.ratio is None else f"{self.ratio:.2f}",
            "" if self.bar is None else f">= {self.bar:g} {verdict}",
            self.against,
        ]


HEAD = ["workload", "what", "unit", "ours", "theirs", "ratio", "bar", "theirs is"]


def rate(
    workload: str,
    what: str,
    tokens: Sequence[tuple[int, int]],
    seconds: Sequence[tuple[float, float]],
    bar: float | None,
    against: str,
) -> Line:
    """Tokens per second. tokens, seconds: of ours and theirs, by round; the ratio is the median of the rounds."""
    ours = [count / time for (count, _), (time, _) in zip(tokens, seconds, strict=True)]
    theirs = [count / time for (_, count), (_, time) in zip(tokens, seconds, strict=True)]
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    return Line(workload, what, "tokens/s", statistics.median(ours), statistics.median(theirs), ratio, bar, against)


def duration(workload: str, what: str, seconds: Sequence[tuple[float, float]], bar: float | None, against: str) -> Line:
    """Seconds, by round; the ratio says how many times longer theirs is."""
    ours, theirs = zip(*seconds, strict=True)
    ratio = statistics.median(b / a for a, b in seconds)
    return Line(workload, what, "s", statistics.median(ours), statistics.median(theirs), ratio, bar, against)


def memory_below(workload: str, ours: int, theirs: int, weights: int) -> list[Line]:
    """Peaks in bytes, and how many copies of the weights lie between them."""
    what, against = "peak of training, above idle", "TRL, without precompute"
    copies = Line(workload, "memory below theirs", "weights", (theirs - ours) / weights, None, None, 1.0, against)
    return [Line(workload, what, "MiB", ours / MIB, theirs / MIB, theirs / ours, None, against), copies]


def table(lines: Sequence[Line]) -> str:
    """In Markdown, aligned."""
    rows = [HEAD, *(line.cells() for line in lines)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(text)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}"
