"""Rows that go through the model together, and what the device holds of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nemo_spin.generation.cache import CacheShape, KVCache, round_up
from nemo_spin.generation.rows import Row
from nemo_spin.generation.sampling import SeenTokens
from nemo_spin.generation.schedule import Schedule
from nemo_spin.generation.stages import Underway


class RowGroup:
    """One of the groups that are in flight at a time: under pipeline parallelism, each in another stage.

    seen: the tokens of each row, where the sampler needs them.
    underway: the tokens that are being sampled for `rows_underway`, in slots from `first_underway` on; None between
    two passes.
    """

    def __init__(self, schedule: Schedule, slots: int, shape: CacheShape, seen: SeenTokens | None) -> None:
        self.schedule, self.seen = schedule, seen
        self.cache = KVCache(shape)
        self.underway: Underway | None = None
        self.rows_underway: Sequence[Row] = ()
        self.first_underway = 0
        # On the device from step to step: only what changes the rows of the group crosses over to it.
        self._state = torch.zeros(4, slots, dtype=torch.int64, device=shape.device)
        self._last_ids, self._positions, self._lengths, self._keys = self._state

    @property
    def idle(self) -> bool:
        """Whether nothing is to be done for it unless rows are waiting."""
        return not self.schedule.active and self.underway is None

    def place(self, rows: Sequence[Row]) -> int:
        """Rows have got the slots after those that were active; returns the first of these."""
        first = len(self.schedule.active) - len(rows)
        self.make_room(held=first)
        host = [[0, row.length - 1, len(row.ids), row.key] for row in rows]
        self._state[:, first : first + len(rows)] = to_device(host, self._state.device).T
        if self.seen is not None:
            self.seen.admit(first, [(*row.prompt_ids, *row.ids) for row in rows])
        return first

    def make_room(self, held: int) -> None:
        """In the cache, for all active rows as long as they are now; the first `held` are in it already."""
        rows = len(self.schedule.active)
        if self.cache.rows < rows or self.cache.capacity < round_up(self.schedule.longest):
            self.cache.resize(rows, self.schedule.capacity, held)

    def last_ids(self) -> Tensor:
        """[b] int64: the newest token of each active row, not yet in the cache."""
        return self._last_ids[: len(self.schedule.active)]

    def positions(self) -> Tensor:
        """[b] int64: where in their rows the newest tokens stand."""
        return self._positions[: len(self.schedule.active)]

    def randomness(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """([count] int64 keys, [count] int64 tokens of the responses so far): what the draw of the next depends on."""
        slots = slice(first, first + count)
        return self._keys[slots], self._lengths[slots]

    def extend(self, first: int, ids: Tensor) -> None:
        """The rows in slots from `first` on each got one more token. ids: [b] int64."""
        slots = slice(first, first + len(ids))
        self._last_ids[slots] = ids
        self._positions[slots] += 1
        self._lengths[slots] += 1

    def close_gaps(self, moves: Sequence[tuple[int, int]]) -> None:
        """Move rows, as the schedule has done."""
        if not moves:
            return
        sources, destinations = to_device(moves, self._state.device).T
        length = max(self.schedule.active[destination].length for _, destination in moves)
        self.cache.move(sources, destinations, min(length, self.cache.capacity))
        self._state[:, destinations] = self._state[:, sources]
        if self.seen is not None:
            self.seen.move(sources, destinations)


def to_device(values: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """An int64 tensor, without waiting for the device to have it."""
    on_gpu = device.type == "cuda"
    return torch.tensor(values, dtype=torch.int64, pin_memory=on_gpu).to(device, non_blocking=on_gpu)
