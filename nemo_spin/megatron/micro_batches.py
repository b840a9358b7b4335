"""Cuts a global batch into micro-batches of about one length, and shares them out over data-parallel ranks.

All ranks get the same number of micro-batches, because pipeline and gradient reduction go in step. What is in them is a
function of the lengths and the settings alone.

What is cut are groups of items that share a prompt: they cost less together, so a group is split only where it has to
be.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Generic, Protocol, Self, TypeVar

from nemo_spin.megatron.sequences import ResponseGroup


class Group(Protocol):
    """One or more items, the longest first; a slice of them is a group too."""

    @property
    def sequences(self) -> ResponseGroup:
        """What goes through the model for all of them."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, items: slice) -> Self: ...


G = TypeVar("G", bound=Group)


@dataclass(frozen=True, slots=True)
class Single:
    """A group of one item. number: anything by which the caller knows it."""

    sequences: ResponseGroup
    number: int = 0

    def __len__(self) -> int:
        return 1

    def __getitem__(self, items: slice) -> Single:
        return self


@dataclass(frozen=True, slots=True)
class Size:
    """How much goes through the model together.

    items: at most so many. tokens: at most so many in place of that; an item that has more goes alone.
    padded: responses are filled up to the longest one, and the filling counts.
    copied_prompts: each response has a copy of its prompt, as it has where it is padded.
    """

    items: int
    tokens: int | None = None
    padded: bool = False
    copied_prompts: bool = False

    def cost(self, batch: Sequence[Group]) -> int:
        """Tokens that the model computes for these groups, together."""
        sequences = [group.sequences for group in batch]
        if self.padded:
            return max(each.longest for each in sequences) * sum(len(each.responses) for each in sequences)
        return sum(self._packed(each) for each in sequences)

    def _packed(self, group: ResponseGroup) -> int:
        copies = len(group.responses) - 1 if self.copied_prompts else 0
        return group.packed_tokens + copies * len(group.prompt_ids)


def cut(groups: Sequence[G], size: Size, multiple_of: int = 1) -> list[list[G]]:
    """Micro-batches, the longest groups first; as few as `size` allows, of even work.

    Their number is a multiple of `multiple_of`; where there are too few items, the last micro-batches are empty.
    """
    return _Cutter(groups, size).cut(multiple_of) if groups else []


def share_out(groups: Sequence[G], size: Size, ranks: int) -> list[list[list[G]]]:
    """By rank: its micro-batches as `cut` makes them; an empty one where there are too few items."""
    batches = cut(groups, size, ranks)
    batches.sort(key=lambda batch: -size.cost(batch) if batch else 0)
    by_rank: list[list[list[G]]] = [[] for _ in range(ranks)]
    for turn, start in enumerate(range(0, len(batches), ranks)):
        # To and fro, so that no rank always gets the heaviest of a turn.
        for position, batch in enumerate(batches[start : start + ranks]):
            by_rank[position if turn % 2 == 0 else ranks - 1 - position].append(batch)
    return by_rank


class _Cutter(Generic[G]):
    """The groups in the order in which they are cut: the longest first."""

    def __init__(self, groups: Sequence[G], size: Size) -> None:
        self.size = size
        self.groups = sorted(groups, key=lambda group: (-group.sequences.longest, -group.sequences.packed_tokens))
        # Asked for again with every limit that is tried.
        self.costs = [size.cost([group]) for group in self.groups]

    def cut(self, multiple_of: int) -> list[list[G]]:
        size = self.size
        if size.tokens is None:
            count = -(-_items(self.groups) // (size.items * multiple_of)) * multiple_of
            return _evenly(self.groups, count, size.items)
        count = len(self._greedily(size.tokens))
        count = -(-count // multiple_of) * multiple_of
        # The lowest limit that needs no more micro-batches evens them out.
        low, high = 0, size.tokens
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if len(self._greedily(middle)) <= count else (middle, high)
        batches = self._greedily(high)
        while len(batches) < count and (divisible := [i for i, batch in enumerate(batches) if _items(batch) > 1]):
            heaviest = max(divisible, key=lambda i: size.cost(batches[i]))
            batches[heaviest : heaviest + 1] = _evenly(batches[heaviest], 2, most=_items(batches[heaviest]))
        return batches + [[] for _ in range(count - len(batches))]

    def _greedily(self, limit: int) -> list[list[G]]:
        """As much in each as its limit of tokens allows."""
        batches: list[list[G]] = []
        rows = longest = tokens = 0
        for whole, cost_of_whole in zip(self.groups, self.costs, strict=True):
            fits = cost_of_whole <= limit
            for group, cost in [(whole, cost_of_whole)] if fits else self._pieces(whole, limit):
                sequences = group.sequences
                rows, longest = rows + len(sequences.responses), max(longest, sequences.longest)
                tokens = rows * longest if self.size.padded else tokens + cost
                if not batches or tokens > limit:
                    batches.append([])
                    rows, longest, tokens = len(sequences.responses), sequences.longest, cost
                batches[-1].append(group)
        return batches

    def _pieces(self, group: G, limit: int) -> list[tuple[G, int]]:
        """The group in pieces that cost no more than the limit, or have one item; and what they cost."""
        pieces, start = [], 0
        for end in range(1, len(group) + 1):
            if end == len(group) or self.size.cost([group[start : end + 1]]) > limit:
                pieces.append(group[start:end])
                start = end
        return [(piece, self.size.cost([piece])) for piece in pieces]


def _evenly(groups: Sequence[G], count: int, most: int) -> list[list[G]]:
    """In `count` parts of at most `most` items, about as many in each; between two groups where that can be."""
    total, between = _items(groups), set(accumulate(map(len, groups)))
    ends = [0]
    for part in range(1, count):
        even = total * part // count
        if total >= count:
            fewest = max(ends[-1] + 1, total - most * (count - part))
            furthest = min(ends[-1] + most, total - (count - part))
            possible = between & set(range(fewest, furthest + 1))
            even = min(possible or {min(max(even, fewest), furthest)}, key=lambda end: (abs(end - even), end))
        ends.append(even)
    ends.append(total)
    rest = deque(groups)
    return [_take(rest, end - start) for start, end in pairwise(ends)]


def _take(groups: deque[G], items: int) -> list[G]:
    """Remove so many items from the front; a group that has more is split."""
    taken = []
    while items:
        group = groups.popleft()
        if len(group) > items:
            groups.appendleft(group[items:])
        taken.append(group[:items])
        items -= len(taken[-1])
    return taken


def _items(groups: Sequence[Group]) -> int:
    return sum(map(len, groups))
