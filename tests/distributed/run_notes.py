"""Notes that the processes of a run take of what they do, and what they tell after all its starts."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_NOTES = "notes.jsonl"
_PHASE_BYTES = 64


class Notes:
    """Those of one process, in the file that all processes of all starts of a run share: a line of JSON each.

    A line is with the system when `add` returns: SIGKILL loses none.
    """

    def __init__(self, directory: Path, rank: int, start: int) -> None:
        self._file = os.open(directory / _NOTES, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._phase_file = os.open(_phase_file(directory, rank), os.O_WRONLY | os.O_CREAT)
        self._common = {"start": start, "rank": rank}
        self._phases: list[str] = []

    def add(self, kind: str, **values: Any) -> None:
        line = {"kind": kind, **self._common, "time": time.time(), **values}
        os.write(self._file, (json.dumps(line) + "\n").encode())

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What the process does meanwhile; of phases within each other the innermost counts."""
        self._phases.append(name)
        self._show_phase()
        began = time.monotonic()
        try:
            yield
        finally:
            self.add("phase", name=name, seconds=time.monotonic() - began)
            self._phases.pop()
            self._show_phase()

    def _show_phase(self) -> None:
        name = self._phases[-1] if self._phases else "leaving"
        os.pwrite(self._phase_file, name.encode().ljust(_PHASE_BYTES), 0)


def _phase_file(directory: Path, rank: int) -> Path:
    return directory / f"phase-{rank}"


def current_phase(directory: Path, rank: int) -> str:
    """What the rank is doing, or did when it was killed."""
    path = _phase_file(directory, rank)
    return path.read_text().strip() if path.exists() else ""


def read_notes(directory: Path) -> list[dict[str, Any]]:
    path = directory / _NOTES
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@dataclass
class History:
    """A run over all its starts.

    steps: the notes of the steps that the final weights come from, by number. made: of all steps, in order.
    resumed: the step that each start went on from, if it came so far. asked: how many responses were asked of the
    generator, by start. again: how many of them an earlier start had asked of the same reference. after_finish: those
    that it had even got, as (iteration, index).
    """

    steps: dict[int, dict[str, Any]] = field(default_factory=dict)
    made: list[dict[str, Any]] = field(default_factory=list)
    resumed: dict[int, int] = field(default_factory=dict)
    asked: Counter[int] = field(default_factory=Counter)
    again: Counter[int] = field(default_factory=Counter)
    after_finish: list[tuple[int, int]] = field(default_factory=list)

    @property
    def losses(self) -> list[float]:
        return [self.steps[number]["loss"] for number in sorted(self.steps)]

    def repeated(self, start: int) -> int:
        """Steps that this start made and an earlier one had made."""
        earlier = {step["step"] for step in self.made if step["start"] < start}
        return sum(step["step"] in earlier for step in self.made if step["start"] == start)


def history_of(notes: list[dict[str, Any]]) -> History:
    history = History()
    asked: set[tuple[int, int, int]] = set()
    finished: set[tuple[int, int, int]] = set()
    for note in notes:
        if note["kind"] == "fit":
            history.resumed[note["start"]] = note["step"]
            history.steps = {number: step for number, step in history.steps.items() if number <= note["step"]}
        elif note["kind"] == "step":
            assert note["step"] not in history.steps, f"start {note['start']} made step {note['step']} twice"
            history.steps[note["step"]] = note
            history.made.append(note)
        elif note["kind"] in ("asked", "finished"):
            # A reference is known by the start that made its last step: when that is lost and made again, it is
            # another one.
            before = [number for number, step in history.steps.items() if step["iteration"] < note["iteration"]]
            reference = history.steps[max(before)]["start"] if before else -1
            keys = {(note["iteration"], reference, index) for index in note["indices"]}
            if note["kind"] == "finished":
                finished |= keys
                continue
            history.asked[note["start"]] += len(keys)
            history.again[note["start"]] += len(keys & asked)
            history.after_finish += [(iteration, index) for iteration, _, index in sorted(keys & finished)]
            asked |= keys
    return history


def every_example_once(history: History, steps: int, examples: int) -> list[str]:
    """Sentences, if the weights come not from every step once, and every epoch not from every example once."""
    found = [f"step {number} is missing" for number in range(1, steps + 1) if number not in history.steps]
    epochs: dict[tuple[int, int], list[int]] = {}
    for step in history.steps.values():
        epochs.setdefault((step["iteration"], step["epoch"]), []).extend(step["indices"])
    for (iteration, epoch), indices in epochs.items():
        if sorted(indices) != list(range(examples)):
            found.append(f"iteration {iteration}, epoch {epoch} was trained on the examples {sorted(indices)}")
    return found
