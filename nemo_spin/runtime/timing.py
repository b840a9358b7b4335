"""Where a run's time goes, in seconds on the clock."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Stopwatch:
    """Measures activities that do not overlap. `last` and `total` hold seconds by activity, 0 where there were none."""

    def __init__(
        self, begins: Callable[[str], None] = lambda activity: None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """begins: told each activity that begins."""
        self._begins = begins
        self._clock = clock
        self._started = clock()
        self.last: dict[str, float] = defaultdict(float)
        self.total: dict[str, float] = defaultdict(float)
        self._times: dict[str, int] = defaultdict(int)

    @contextmanager
    def measure(self, activity: str) -> Iterator[None]:
        """Around the activity; not counted when it ends by an exception."""
        self._begins(activity)
        started = self._clock()
        yield
        self.last[activity] = self._clock() - started
        self.total[activity] += self.last[activity]
        self._times[activity] += 1

    def mean(self, activity: str) -> float:
        """Seconds that the activity took on average, 0 before its first time."""
        return self.total[activity] / max(self._times[activity], 1)

    def share(self, activity: str) -> float:
        """Of all the time since the stopwatch was made, from 0 to 1."""
        return self.total[activity] / max(self._clock() - self._started, 1e-9)


def in_words(seconds: float) -> str:
    """`3d 04h`, `2h 05m`, `7m 30s`, `12s`."""
    seconds = round(seconds)
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if days:
        return f"{days}d {hours % 24:02d}h"
    if hours:
        return f"{hours}h {minutes % 60:02d}m"
    if minutes:
        return f"{minutes}m {seconds % 60:02d}s"
    return f"{seconds}s"
