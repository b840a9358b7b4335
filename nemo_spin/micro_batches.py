"""Cuts a global batch into micro-batches of about one length, and shares them out over data-parallel ranks.

All ranks get the same number of micro-batches, because pipeline and gradient reduction go in step. What is in them is a
function of the lengths and the settings alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from nemo_spin.pairs import ResponseGroup


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

    def cost(self, groups: Sequence[ResponseGroup]) -> int:
        """Tokens that the model computes for these, together."""
        if self.padded:
            return max(group.longest for group in groups) * sum(len(group.responses) for group in groups)
        return sum(self._packed(group) for group in groups)

    def _packed(self, group: ResponseGroup) -> int:
        copies = len(group.responses) - 1 if self.copied_prompts else 0
        return group.packed_tokens + copies * len(group.prompt_ids)


def cut(groups: Sequence[ResponseGroup], size: Size, multiple_of: int = 1) -> list[list[int]]:
    """Micro-batches, the longest items first, as numbers of the items; as few as `size` allows, of even work.

    Their number is a multiple of `multiple_of`; where there are too few items, the last micro-batches are empty.
    """
    if not groups:
        return []
    order = sorted(range(len(groups)), key=lambda i: (-groups[i].longest, -groups[i].packed_tokens, i))
    if size.tokens is None:
        count = -(-len(order) // (size.items * multiple_of)) * multiple_of
        return _evenly(order, count)
    count = len(_greedily(order, groups, size, size.tokens))
    count = -(-count // multiple_of) * multiple_of
    # The lowest limit that needs no more micro-batches evens them out.
    low, high = 0, size.tokens
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_greedily(order, groups, size, middle)) <= count else (middle, high)
    batches = _greedily(order, groups, size, high)
    while len(batches) < count and any(len(batch) > 1 for batch in batches):
        heaviest = max((b for b in batches if len(b) > 1), key=lambda b: size.cost([groups[i] for i in b]))
        at = batches.index(heaviest)
        batches[at : at + 1] = _evenly(heaviest, 2)
    return batches + [[] for _ in range(count - len(batches))]


def share_out(groups: Sequence[ResponseGroup], size: Size, ranks: int) -> list[list[list[int]]]:
    """By rank: its micro-batches, as numbers of the items; an empty one where there are too few items."""
    batches = cut(groups, size, multiple_of=ranks)
    batches.sort(key=lambda batch: -size.cost([groups[i] for i in batch]) if batch else 0)
    by_rank: list[list[list[int]]] = [[] for _ in range(ranks)]
    for turn, start in enumerate(range(0, len(batches), ranks)):
        # To and fro, so that no rank always gets the heaviest of a turn.
        for position, batch in enumerate(batches[start : start + ranks]):
            by_rank[position if turn % 2 == 0 else ranks - 1 - position].append(batch)
    return by_rank


def _greedily(order: Sequence[int], groups: Sequence[ResponseGroup], size: Size, limit: int) -> list[list[int]]:
    batches: list[list[int]] = []
    rows = tokens = 0
    for i in order:
        group = groups[i]
        if size.padded:
            # The longest comes first.
            rows += len(group.responses)
            tokens = rows * (groups[batches[-1][0]].longest if batches else group.longest)
        else:
            tokens += size.cost([group])
        if not batches or tokens > limit:
            batches.append([])
            rows, tokens = len(group.responses), size.cost([group])
        batches[-1].append(i)
    return batches


def _evenly(items: Sequence[int], count: int) -> list[list[int]]:
    ends = [len(items) * i // count for i in range(count + 1)]
    return [list(items[start:end]) for start, end in pairwise(ends)]
