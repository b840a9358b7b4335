"""Random moments in the life of a run, and who is killed then."""

from __future__ import annotations

import os
import random
import signal
import statistics
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from killable import TP2_PP2, KillableRun
from run_notes import current_phase

WHOLE = ("starting", "between steps")  # phases that last about as long as the run
RESUMING = "resuming"
CHECKPOINT = "writing a checkpoint"  # which goes on beside the phases
_SHORTEST = 0.01  # seconds: shorter phases are not met by looking for them


def phase_lengths(notes: list[dict[str, Any]]) -> dict[str, float]:
    """Mean seconds of each phase of the first rank, in a run from nothing."""
    seconds = defaultdict(list)
    for note in notes:
        if note["kind"] == "phase" and note["rank"] == 0:
            seconds[note["name"]].append(note["seconds"])
    return {name: mean for name, values in seconds.items() if (mean := statistics.mean(values)) >= _SHORTEST}


@dataclass
class Moment:
    """When to kill whom in one start of a run.

    phase: of the first victim, None for the whole start. delay: seconds after its begin. victims: ranks.
    doing: what the victims did when they were killed; empty as long as they live.
    """

    run: KillableRun
    phase: str | None
    delay: float
    victims: list[int]
    doing: str = ""
    _made: float = field(default_factory=time.time, repr=False)
    _since: float | None = field(default=None, repr=False)

    def strike(self, processes: list[int]) -> None:
        """Called again and again with the ids of the run's processes, by rank; kills when it is time."""
        if self._since is None and self._has_begun():
            self._since = time.monotonic()
        if self._since is None or time.monotonic() - self._since < self.delay:
            return
        for rank in self.victims:
            with suppress(ProcessLookupError):
                os.kill(processes[rank], signal.SIGKILL)
        phases = {current_phase(self.run.directory, rank) or "importing" for rank in self.victims}
        self.doing = ", ".join(sorted(phases)) + (f", {CHECKPOINT}" if self._is_writing() else "")

    def _has_begun(self) -> bool:
        if self.phase == CHECKPOINT:
            return self._is_writing()
        return self.phase in (None, current_phase(self.run.directory, self.victims[0]))

    def _is_writing(self) -> bool:
        """Whether this start is; an earlier one may have left what it was writing."""
        unfinished = (self.run.run_dir / "checkpoints").glob(".unfinished-iteration*")
        with suppress(FileNotFoundError):
            return any(path.stat().st_ctime > self._made for path in unfinished)
        return False


def draw(chance: random.Random, run: KillableRun, lengths: dict[str, float]) -> Moment:
    """Any moment of a start, as long as a run from nothing takes; or a phase, and any moment of it."""
    ranks = list(range(TP2_PP2.world_size))
    victims = [chance.choice(ranks)] if chance.random() < 0.5 else ranks
    if chance.random() < 0.5:
        return Moment(run, None, chance.uniform(0, lengths[WHOLE[0]]), victims)
    inner = {name: length for name, length in lengths.items() if name not in WHOLE}
    inner |= {RESUMING: inner["loading the model"], CHECKPOINT: inner["saving"]}
    phase = chance.choice(sorted(inner))
    return Moment(run, phase, chance.uniform(0, inner[phase]), victims)
