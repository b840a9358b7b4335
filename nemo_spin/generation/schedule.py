"""Which rows are decoded together: continuous batching over a fixed number of slots.

Decided on the host from lengths and tokens alone, so that every rank decides the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

# Tokens of a prefill at most, padding included (a single longer prompt is still taken): bounds its activations.
PREFILL_TOKENS = 16384


@dataclass
class Row:
    """A response in the making.

    order: its place among the requests. key: of its random numbers. budget: tokens at most.
    ids: the tokens so far. finish_reason: None until it is finished.
    """

    order: int
    prompt_ids: tuple[int, ...]
    key: int
    budget: int
    ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def length(self) -> int:
        """Tokens of prompt and response."""
        return len(self.prompt_ids) + len(self.ids)


class Schedule:
    """Rows waiting and rows in slots.

    `active[i]` is the row in slot i: there are no gaps, so a decode step costs what its unfinished rows cost.
    """

    def __init__(self, rows: Iterable[Row], slots: int, prefill_tokens: int = PREFILL_TOKENS) -> None:
        # Rows of similar length are prefilled and decoded together, which saves padding; the longest come first.
        self._waiting = deque(sorted(rows, key=lambda row: (-len(row.prompt_ids), row.order)))
        self._slots, self._prefill_tokens = slots, prefill_tokens
        # A prefill costs a pass through the model however few rows it has: a few free slots are worth waiting for.
        self._refill = max(1, slots // 8)
        self.active: list[Row] = []

    @property
    def done(self) -> bool:
        return not self._waiting and not self.active

    def admit(self) -> list[Row]:
        """Move waiting rows to the slots after the active ones; returns them, none if decoding should go on first."""
        free = self._slots - len(self.active)
        if not self._waiting or (self.active and free < min(self._refill, len(self._waiting))):
            return []
        count = max(1, min(free, len(self._waiting), self._prefill_tokens // max(1, len(self._waiting[0].prompt_ids))))
        admitted = [self._waiting.popleft() for _ in range(count)]
        self.active.extend(admitted)
        return admitted

    def retire(self) -> tuple[list[Row], list[tuple[int, int]]]:
        """Remove finished rows. Returns them, and the moves (from slot, to slot) that close the gaps they leave."""
        finished = [row for row in self.active if row.finish_reason is not None]
        remaining = len(self.active) - len(finished)
        gaps = [slot for slot, row in enumerate(self.active[:remaining]) if row.finish_reason is not None]
        movers = [slot for slot in range(remaining, len(self.active)) if self.active[slot].finish_reason is None]
        moves = list(zip(movers, gaps, strict=True))
        for source, destination in moves:
            self.active[destination] = self.active[source]
        del self.active[remaining:]
        return finished, moves
