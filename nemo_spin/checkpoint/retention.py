"""Which checkpoints of a run stay: the newest, the end of every iteration, and the best by a metric."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_spin.checkpoint.run_state import Stored


@dataclass(frozen=True)
class Retention:
    """Which checkpoints within an iteration stay beside the newest one.

    top_k: so many of the best by `monitor`, among those that have it; -1 for all. mode: "min" or "max".
    """

    monitor: str = "val_loss"
    mode: str = "min"
    top_k: int = 0

    def rank(self, stored: Sequence[Stored]) -> list[Stored]:
        """Those that have the metric, the best first, of equals the older."""
        sign = 1 if self.mode == "min" else -1
        values = {s.path: sign * s.metrics[self.monitor] for s in stored if self.monitor in s.metrics}
        ranked = [s for s in stored if s.path in values and values[s.path] == values[s.path]]
        return sorted(ranked, key=lambda s: (values[s.path], s.age))

    def superfluous(self, stored: Sequence[Stored], newest: Path) -> list[Path]:
        """Those to remove. newest: it has just been written, and stays."""
        last_at = {s.position: s for s in sorted(stored, key=lambda s: s.age)}
        superseded = [s for s in stored if last_at[s.position] is not s]
        passing = [s for s in stored if s not in superseded and not s.keep]
        staying = passing if self.top_k == -1 else self.rank(passing)[: self.top_k]
        return [s.path for s in (*superseded, *passing) if s.path != newest and s not in staying]
