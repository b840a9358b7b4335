"""Figures of finished runs, on disk, found by the runs' settings: an interrupted study goes on where it was."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """A policy that was measured. iteration: -1 for the SFT model; of SFT, the round. step: optimizer steps so far.
    figures: on held-out data, by name; `train/...`: what the run logged, by its name there.
    """

    iteration: int
    step: int
    figures: dict[str, float]


@dataclass(frozen=True, slots=True)
class Result:
    """rows: in their order. seconds: by what they were spent on. error: what ended the run early, or None."""

    rows: tuple[Row, ...]
    seconds: dict[str, float]
    error: str | None = None

    def at(self, iteration: int) -> Row | None:
        """The policy after an iteration (or round); negative -1 is the SFT model."""
        return next((row for row in self.rows if row.iteration == iteration), None)


class Results:
    """A directory of them. Those that failed are kept too, to be reported, and are run again the next time."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def get(self, key: str) -> Result | None:
        path = self.directory / f"{key}.json"
        if not path.exists():
            return None
        stored = json.loads(path.read_text(encoding="utf-8"))
        rows = tuple(Row(row["iteration"], row["step"], _numbers(row["figures"])) for row in stored["rows"])
        return Result(rows, stored["seconds"], stored["error"])

    def wall(self, more: float) -> float:
        """Seconds that the study took, over all its starts. more: of this one."""
        path = self.directory / "wall-clock"
        total = more + (float(path.read_text(encoding="utf-8")) if path.exists() else 0.0)
        path.write_text(f"{total:.1f}\n", encoding="utf-8")
        return total

    def put(self, key: str, settings: dict[str, Any], result: Result) -> None:
        path = self.directory / f"{key}.json"
        rows = [
            {"iteration": row.iteration, "step": row.step, "figures": _without_nan(row.figures)} for row in result.rows
        ]
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        content = {"settings": settings, "rows": rows, "seconds": result.seconds, "error": result.error}
        unfinished.write_text(json.dumps(content, indent=1), encoding="utf-8")
        os.replace(unfinished, path)


def _without_nan(figures: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


def _numbers(figures: dict[str, float | None]) -> dict[str, float]:
    return {name: math.nan if value is None else value for name, value in figures.items()}
