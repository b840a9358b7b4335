"""What all figures share: what describes them, plotly's JSON, colours and the layout, which page.css adapts to dark
screens and to print."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

COLORS = ("#2b8cd4", "#e07b28", "#22a17b", "#a673c9")


@dataclass(frozen=True, slots=True)
class Spec:
    """A figure of figures.yaml, which says what the fields mean."""

    key: str
    title: str
    unit: str
    metrics: Sequence[str] | Mapping[str, str]
    caption: str
    bars: str | None = None
    level: float | str | None = None
    smooth: bool = False
    continuous: Sequence[str] = ()
    errors: str | None = None


@dataclass(frozen=True, slots=True)
class Figure:
    """json: data and layout for plotly. description: the figure in words, for those who do not see it."""

    key: str
    title: str
    caption: str
    description: str
    json: str


def layout(y_title: str, x_title: str) -> dict[str, Any]:
    """Of a figure with these titles on its axes."""
    axis = {"gridcolor": "#ccc", "zeroline": False, "automargin": True, "ticks": "outside", "tickcolor": "#999"}
    axis |= {"exponentformat": "power", "minexponent": 5, "separatethousands": True}
    return {
        "height": 300,
        "margin": {"l": 10, "r": 12, "t": 24, "b": 10},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": "#333"},
        "colorway": list(COLORS),
        "showlegend": True,
        "legend": {"orientation": "h", "x": 0, "yref": "container", "y": 0, "yanchor": "bottom"},
        "hoverlabel": {"bgcolor": "#222", "bordercolor": "#222", "font": {"color": "#fff"}},
        "xaxis": axis | {"title": {"text": x_title}, "showgrid": False},
        "yaxis": axis | {"title": {"text": y_title}},
    }


def to_json(traces: list[dict[str, Any]], arranged: dict[str, Any]) -> str:
    """JSON that may stand in a <script> element."""
    text = json.dumps({"data": traces, "layout": arranged}, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")
