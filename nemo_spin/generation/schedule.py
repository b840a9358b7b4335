"""Which rows go through the model together: continuous batching over slots and a number of tokens in the cache.

Decided on the host from lengths and tokens alone, so that every rank decides the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from itertools import chain, takewhile

from nemo_spin.generation.cache import GRANULE, round_up
from nemo_spin.generation.rows import Row

# Tokens of a prefill at most, padding included (a single longer prompt is still taken): bounds its activations. Rows
# that read the same count once.
PREFILL_TOKENS = 16384
# Beyond, a pass over more rows takes longer in the same measure, on any device.
MOST_SLOTS = 256


def groups_wanted(stages: int) -> int:
    """Groups of rows in flight: one more than there are stages, so that what goes from stage to stage has time to
    arrive; a single stage waits for nobody."""
    return stages + 1 if stages > 1 else 1


class Waiting:
    """Rows that have no slot, for all groups together.

    The longest prompts come first: rows of similar length are prefilled and decoded together, which saves padding. Of
    equal ones that with the larger budget comes first, so that what is left at the end is short. Rows with the same
    prompt come one after the other.
    """

    def __init__(self, rows: Iterable[Row]) -> None:
        by_prompt: dict[tuple[int, ...], list[Row]] = {}
        for row in rows:
            by_prompt.setdefault(row.prompt_ids, []).append(row)
        for alike in by_prompt.values():
            alike.sort(key=lambda row: (-row.budget, row.order))
        prompts = sorted(by_prompt.values(), key=lambda alike: (-alike[0].length, -alike[0].budget, alike[0].order))
        self._rows = deque(chain.from_iterable(prompts))

    def __len__(self) -> int:
        return len(self._rows)

    def first(self) -> Row:
        return self._rows[0]

    def copies_of_first(self) -> int:
        """How many rows, from the first on, read the same as it."""
        first = self._rows[0]
        return sum(1 for _ in takewhile(first.reads_as, self._rows))

    def take(self) -> Row:
        return self._rows.popleft()

    def put_back(self, row: Row) -> None:
        """It is the next to be taken."""
        self._rows.appendleft(row)


class Schedule:
    """The rows of one group, in slots.

    `active[i]` is the row in slot i: there are no gaps, so a decode step costs what its unfinished rows cost.
    `longest` is the number of tokens of the longest of them.
    slots: rows at most. cache_tokens: that the cache of this group holds at most, every row taking as many as the
    longest; has to be enough for the longest row alone. refill: free slots that are worth a prefill.
    """

    def __init__(
        self,
        waiting: Waiting,
        slots: int,
        cache_tokens: int,
        prefill_tokens: int = PREFILL_TOKENS,
        refill: int | None = None,
    ) -> None:
        self._waiting, self._slots, self._cache_tokens = waiting, slots, cache_tokens
        self._prefill_tokens = prefill_tokens
        # A prefill costs a pass through the model however few rows it has: a few free slots are worth waiting for.
        self._refill = max(1, slots // 8) if refill is None else refill
        self._arrivals: list[Row] = []
        self.active: list[Row] = []
        self.longest = 0

    @property
    def capacity(self) -> int:
        """Tokens that a row of the cache should have for the active rows: with room to grow, where there is room."""
        limit = max(row.longest for row in self.active)
        room = self._cache_tokens // len(self.active) // GRANULE * GRANULE
        return max(round_up(self.longest), min(round_up(min(_with_room_to_grow(self.longest), limit)), room))

    def admit(self) -> list[Row]:
        """Move waiting rows to the slots after the active ones; returns them, none if decoding should go on first."""
        worth = min(self._refill, len(self._waiting)) if self.active else 1
        if not self._waiting or self._slots - len(self.active) < worth:
            return []
        taken, cache_is_full = self._take()
        if cache_is_full and len(taken) < worth:
            for row in reversed(taken):
                self._waiting.put_back(row)
            return []
        self.active.extend(taken)
        self._arrivals.extend(taken)
        self.longest = _longest(self.active)
        return taken

    def leave(self) -> tuple[list[Row], list[Row], list[tuple[int, int]]]:
        """Remove finished rows and, where the cache is too small for all others, those that came last.

        Returns the finished ones, those that wait again, and the moves (from slot, to slot) that close the gaps.
        """
        finished = [row for row in self.active if row.finish_reason is not None]
        preempted = []
        if finished:
            self._arrivals = [row for row in self._arrivals if row.finish_reason is None]
        self.longest = _longest(self._arrivals)
        while len(self._arrivals) * round_up(self.longest) > self._cache_tokens:
            preempted.append(self._arrivals.pop())
            self._waiting.put_back(preempted[-1])
            self.longest = _longest(self._arrivals)
        leaving = finished + preempted
        return finished, preempted, self._close_gaps(leaving) if leaving else []

    def _close_gaps(self, leaving: Collection[Row]) -> list[tuple[int, int]]:
        gone = {id(row) for row in leaving}
        remaining = len(self.active) - len(leaving)
        gaps = [slot for slot, row in enumerate(self.active[:remaining]) if id(row) in gone]
        movers = [slot for slot in range(remaining, len(self.active)) if id(self.active[slot]) not in gone]
        moves = list(zip(movers, gaps, strict=True))
        for source, destination in moves:
            self.active[destination] = self.active[source]
        del self.active[remaining:]
        return moves

    def _take(self) -> tuple[list[Row], bool]:
        """The waiting rows for which there are slots, cache and prefill tokens; whether the cache is full then."""
        taken: list[Row] = []
        longest, limit = self.longest, max((row.longest for row in self.active), default=0)
        padded, distinct = 0, 0
        while self._waiting and (rows := len(self.active) + len(taken)) < self._slots:
            row = self._waiting.first()
            if not (taken and row.reads_as(taken[-1])):
                distinct += 1
                # Rows apart from those that read the same would have to read it again. As many slots as are not worth a
                # prefill may wait for that.
                if taken and self._slots - rows < self._waiting.copies_of_first() <= self._refill:
                    break
            longest, limit, padded = max(longest, row.length), max(limit, row.longest), max(padded, row.length)
            grown = round_up(min(_with_room_to_grow(longest), limit))
            if rows and (rows + 1) * grown > self._cache_tokens:
                return taken, True
            if taken and distinct * padded > self._prefill_tokens:
                break
            taken.append(self._waiting.take())
        return taken, False


def _longest(rows: Iterable[Row]) -> int:
    return max((row.length for row in rows), default=0)


def _with_room_to_grow(length: int) -> int:
    return length + max(4 * GRANULE, length // 4)
