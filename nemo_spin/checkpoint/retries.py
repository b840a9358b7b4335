"""When a checkpoint that could not be written is tried again."""

from __future__ import annotations

_LONGEST = 64


class Retries:
    """Counts steps, so that every process decides alike: the first time after one step, then after 2, 4, ... 64."""

    def __init__(self) -> None:
        self._wait = 0
        self._due_at: int | None = None

    @property
    def is_failing(self) -> bool:
        return self._due_at is not None

    def failed(self, step: int) -> int:
        """Writing failed; `step` has been made since. Returns after how many steps it is tried again."""
        self._wait = min(2 * self._wait, _LONGEST) or 1
        self._due_at = step + self._wait
        return self._wait

    def succeeded(self) -> None:
        self._wait, self._due_at = 0, None

    def is_due(self, step: int) -> bool:
        return self._due_at is not None and step >= self._due_at
