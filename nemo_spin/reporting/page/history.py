"""metrics.jsonl: what a run has logged, line by line, and which of the lines count after it was resumed."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_spin.errors import DataError

_POSITION = ("epoch", "iteration_step", "consumed_samples", "total_steps")
# a metric is followed along these lines; others repeat what stands in them
_PRIMARY = ("train", "validation", "rollout")
# a run that begins or goes on writes one of these, and the line before may have been cut off when it was interrupted
_BEGINNINGS = ("start", "resume")


@dataclass(frozen=True, slots=True)
class Record:
    """A line.

    time: Unix seconds. step: optimizer steps done in the run. iteration: counted from 0.
    position: epoch, iteration_step and consumed_samples, where the line has them; total_steps, of the whole run.
    metrics: numbers by name, NaN and infinity among them (null is read as NaN). notes: everything else, as text.
    """

    time: float
    step: int
    iteration: int
    kind: str
    position: dict[str, int]
    metrics: dict[str, float]
    notes: dict[str, str]


@dataclass(slots=True)
class Series:
    """The points of one metric in the order of steps: optimizer steps, values, and the iteration of each."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    iterations: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.steps)

    def finite(self) -> list[tuple[int, float]]:
        """(step, value) of the points that are numbers."""
        return [(step, value) for step, value in zip(self.steps, self.values, strict=True) if math.isfinite(value)]

    def of(self, iteration: int) -> list[float]:
        """The finite values of an iteration."""
        pairs = zip(self.iterations, self.values, strict=True)
        return [value for number, value in pairs if number == iteration and math.isfinite(value)]


class History:
    """The lines of a run that count."""

    def __init__(self, records: list[Record], undone: int = 0, resumes: int = 0) -> None:
        """undone: lines that do not count because the run went on from an earlier step; resumes: how often it did."""
        self.records = records
        self.undone = undone
        self.resumes = resumes
        self._lines: dict[str, list[Record]] = defaultdict(list)
        self._series: dict[str, Series] = {}
        for record in records:
            for name in record.metrics:
                self._lines[name].append(record)

    def names(self) -> list[str]:
        """All metrics, in the order of their names."""
        return sorted(self._lines)

    def iterations(self) -> list[int]:
        """The iterations that have rollouts or training steps."""
        return sorted({record.iteration for record in self.records if record.kind in ("train", "rollout")})

    def series(self, name: str) -> Series:
        """The points of a metric, one for each step; of a step's lines the training line comes first.

        Lines of other kinds than train, validation and rollout repeat or sum up what stands in those: they count at
        steps where there is nothing else. Shares and times, which they give for a whole iteration, are taken from
        them only where nothing else has them.
        """
        if name not in self._series:
            self._series[name] = self._follow(name)
        return self._series[name]

    def _follow(self, name: str) -> Series:
        lines = self._lines.get(name, [])
        primary = [record for record in lines if record.kind in _PRIMARY]
        sums_up = name.startswith(("rollout/", "time/"))
        points: dict[int, Record] = {}
        if not (primary and sums_up):
            points |= {record.step: record for record in lines if record.kind not in _PRIMARY}
        for kind in reversed(_PRIMARY):
            points |= {record.step: record for record in primary if record.kind == kind}
        ordered = [points[step] for step in sorted(points)]
        return Series(
            [record.step for record in ordered],
            [record.metrics[name] for record in ordered],
            [record.iteration for record in ordered],
        )

    def warnings(self, guard: str) -> list[Record]:
        """The lines in which a guard of the run has said something; their notes have its `text`."""
        lines = (record for record in self.records if record.kind == "warning")
        return [record for record in lines if record.notes.get("guard") == guard and "text" in record.notes]

    def last(self, name: str, iteration: int) -> float | None:
        """A metric at the end of an iteration: on its `iteration` line, else the last value before that."""
        value: float | None = None
        summary: float | None = None
        for record in self._lines.get(name, []):
            # the line that shows the model before any training belongs to no iteration's end
            if record.iteration == iteration and record.kind == "iteration" and record.step > 0:
                summary = record.metrics[name]
            elif record.iteration == iteration and record.kind != "iteration":
                value = record.metrics[name]
        return value if summary is None else summary


def read_history(path: Path) -> History:
    """Read metrics.jsonl. A last line that is cut off is left out, as is one that an interruption has cut off.

    Raises DataError for a file without lines, or with a line that cannot be read.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): give a run directory that you may read.") from None
    records: list[Record] = []
    broken: DataError | None = None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = _record(line, f"{path}:{number}")
        except DataError as error:
            # the last element is what follows the last line break: the line that is being written
            if broken is not None:
                raise broken from None
            broken = error if number < len(lines) else None
            continue
        if broken is not None and record.kind not in _BEGINNINGS:
            raise broken
        broken = None
        records.append(record)
    if broken is not None:
        raise broken
    if not records:
        raise DataError(f"{path} has no lines yet: the run has not begun, so wait for its first step.")
    return _that_count(records)


def _that_count(records: list[Record]) -> History:
    counted: list[Record] = []
    undone = resumes = 0
    for record in records:
        if record.kind in _BEGINNINGS:
            kept = [earlier for earlier in counted if earlier.step <= record.step]
            undone += len(counted) - len(kept)
            resumes += record.kind == "resume"
            counted = kept
        counted.append(record)
    return History(counted, undone, resumes)


def _record(line: bytes, where: str) -> Record:
    try:
        values = json.loads(line)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise DataError(f"{where} is not a JSON object: mend or remove the line.")
    step, iteration = (_count(values, key, where) for key in ("step", "iteration"))
    time, kind = values.pop("time", None), values.pop("kind", None)
    if not _is_number(time) or not math.isfinite(time) or not isinstance(kind, str):
        raise DataError(f'{where} needs "time", a number, and "kind", a text: mend or remove the line.')
    position = {key: int(values.pop(key)) for key in _POSITION if _is_count(values.get(key))}
    values = {name: math.nan if value is None else value for name, value in values.items()}
    metrics = {name: float(value) for name, value in values.items() if _is_number(value)}
    notes = {name: _text(value) for name, value in values.items() if name not in metrics}
    return Record(float(time), step, iteration, kind, position, metrics, notes)


def _count(values: dict[str, Any], key: str, where: str) -> int:
    value = values.pop(key, None)
    if not _is_count(value):
        raise DataError(f'{where} needs "{key}", a whole number from 0: mend or remove the line.')
    return int(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return _is_number(value) and math.isfinite(value) and value >= 0 and value == int(value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
