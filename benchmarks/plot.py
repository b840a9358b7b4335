"""Measured over predicted times as an SVG that browsers and GitHub show. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

_COLORS = {"train": "#2b8cd4", "decode": "#e07b28"}
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 760, 480, 70, 50, 20, 190


@dataclass(frozen=True)
class Point:
    """kind: "train" or "decode". predicted, measured: seconds of a step."""

    kind: str
    label: str
    predicted: float
    measured: float


def write_plot(points: Sequence[Point], file: Path) -> None:
    """Both axes are logarithmic and the same; on the line measured and predicted agree."""
    milliseconds = [1000 * value for point in points for value in (point.predicted, point.measured)]
    low, high = math.log10(min(milliseconds) / 1.5), math.log10(max(milliseconds) * 1.5)

    def x(value: float) -> float:
        return _LEFT + (math.log10(1000 * value) - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - (math.log10(1000 * value) - low) / (high - low) * (_HEIGHT - _BOTTOM - _TOP)

    first, last = 10**low / 1000, 10**high / 1000
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        'font-size="11" role="img" aria-label="Measured over predicted milliseconds of a step">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>',
    ]
    for tick in _ticks(low, high):
        at_x, at_y = x(tick / 1000), y(tick / 1000)
        parts += [
            f'<path d="M{at_x:.1f} {_TOP}V{_HEIGHT - _BOTTOM}M{_LEFT} {at_y:.1f}H{_WIDTH - _RIGHT}" stroke="#ddd"/>',
            f'<text x="{at_x:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{tick:g}</text>',
            f'<text x="{_LEFT - 6}" y="{at_y + 4:.1f}" text-anchor="end">{tick:g}</text>',
        ]
    parts += [
        f'<path d="M{x(first):.1f} {y(first):.1f}L{x(last):.1f} {y(last):.1f}" stroke="#888" stroke-dasharray="4"/>',
        f'<text x="{(_WIDTH + _LEFT - _RIGHT) / 2}" y="{_HEIGHT - 12}" text-anchor="middle">predicted, ms</text>',
        f'<text x="16" y="{_HEIGHT / 2}" text-anchor="middle" transform="rotate(-90 16 {_HEIGHT / 2})">'
        "measured, ms</text>",
    ]
    for number, point in enumerate(points, 1):
        color, at_x, at_y = _COLORS[point.kind], x(point.predicted), y(point.measured)
        parts += [
            f'<circle cx="{at_x:.1f}" cy="{at_y:.1f}" r="4" fill="{color}"/>',
            f'<text x="{at_x + 6:.1f}" y="{at_y + 4:.1f}">{number}</text>',
            f'<text x="{_WIDTH - _RIGHT + 14}" y="{_TOP + 15 * number}" fill="{color}">'
            f"{number} {point.kind}: {escape(point.label)}</text>",
        ]
    file.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 of every power of ten between the two logarithms."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    return [tick for power in powers for factor in (1, 2, 5) if low <= math.log10(tick := factor * 10.0**power) <= high]
