"""Cuts a global batch into micro-batches of about one length, and shares them out over data-parallel ranks.

All ranks get the same number of micro-batches, because pipeline and gradient reduction go in step. What is in them is a
function of the lengths and the settings alone.

Pairs of one example lie next to each other. In a micro-batch they are one group, whose prompt and chosen response are
computed once, so they are parted only where they have to be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from nemo_spin.megatron.sequences import ResponseGroup


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


def cut(
    groups: Sequence[ResponseGroup], size: Size, multiple_of: int = 1, examples: Sequence[int] | None = None
) -> list[list[int]]:
    """Micro-batches, the longest items first, as numbers of the items; as few as `size` allows, of even work.

    examples: for pairs, a number of the example of each; None where no items belong together.
    Their number is a multiple of `multiple_of`; where there are too few items, the last micro-batches are empty.
    """
    if not groups:
        return []
    return _Cutter(groups, size, range(len(groups)) if examples is None else examples).cut(multiple_of)


def share_out(
    groups: Sequence[ResponseGroup], size: Size, ranks: int, examples: Sequence[int] | None = None
) -> list[list[list[int]]]:
    """By rank: its micro-batches as `cut` makes them; an empty one where there are too few items."""
    batches = cut(groups, size, ranks, examples)
    batches.sort(key=lambda batch: -size.cost(merged(batch, groups, examples)) if batch else 0)
    by_rank: list[list[list[int]]] = [[] for _ in range(ranks)]
    for turn, start in enumerate(range(0, len(batches), ranks)):
        # To and fro, so that no rank always gets the heaviest of a turn.
        for position, batch in enumerate(batches[start : start + ranks]):
            by_rank[position if turn % 2 == 0 else ranks - 1 - position].append(batch)
    return by_rank


def by_example(numbers: Sequence[int], examples: Sequence[int] | None) -> list[list[int]]:
    """The numbers of a micro-batch, those of one example together."""
    if examples is None:
        return [[i] for i in numbers]
    return [list(run) for _, run in groupby(numbers, key=examples.__getitem__)]


def merged(
    numbers: Sequence[int], groups: Sequence[ResponseGroup], examples: Sequence[int] | None
) -> list[ResponseGroup]:
    """What goes through the model for these items."""
    return [
        groups[run[0]] if len(run) == 1 else ResponseGroup.merged([groups[i] for i in run])
        for run in by_example(numbers, examples)
    ]


class _Cutter:
    """The items in the order in which they are cut: by length, and pairs of an example together."""

    def __init__(self, groups: Sequence[ResponseGroup], size: Size, examples: Sequence[int]) -> None:
        self.groups, self.size, self.examples = groups, size, examples
        of_example: dict[int, list[int]] = {}
        for i in sorted(range(len(groups)), key=lambda i: (-groups[i].longest, -groups[i].packed_tokens, i)):
            of_example.setdefault(examples[i], []).append(i)
        together = [(run, merged(run, groups, examples)[0]) for run in of_example.values()]
        together.sort(key=lambda each: (-each[1].longest, -each[1].packed_tokens, each[0][0]))
        self.runs = [(run, group, size.cost([group])) for run, group in together]
        self.order = [i for run, _ in together for i in run]

    def cut(self, multiple_of: int) -> list[list[int]]:
        size = self.size
        if size.tokens is None:
            count = -(-len(self.order) // (size.items * multiple_of)) * multiple_of
            return self._evenly(self.order, count, size.items)
        count = len(self._greedily(size.tokens))
        count = -(-count // multiple_of) * multiple_of
        # The lowest limit that needs no more micro-batches evens them out.
        low, high = 0, size.tokens
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if len(self._greedily(middle)) <= count else (middle, high)
        batches = self._greedily(high)
        while len(batches) < count and any(len(batch) > 1 for batch in batches):
            heaviest = max((b for b in batches if len(b) > 1), key=self._cost)
            at = batches.index(heaviest)
            batches[at : at + 1] = self._evenly(heaviest, 2, len(heaviest))
        return batches + [[] for _ in range(count - len(batches))]

    def _cost(self, numbers: Sequence[int]) -> int:
        return self.size.cost(merged(numbers, self.groups, self.examples))

    def _greedily(self, limit: int) -> list[list[int]]:
        batches: list[list[int]] = []
        rows = longest = tokens = 0
        for whole in self.runs:
            for run, group, cost in [whole] if whole[2] <= limit else self._pieces(whole[0], limit):
                rows, longest = rows + len(group.responses), max(longest, group.longest)
                tokens = rows * longest if self.size.padded else tokens + cost
                if not batches or tokens > limit:
                    batches.append([])
                    rows, longest, tokens = len(group.responses), group.longest, cost
                batches[-1] += run
        return batches

    def _pieces(self, run: Sequence[int], limit: int) -> list[tuple[list[int], ResponseGroup, int]]:
        """Pairs of one example in groups that cost no more than the limit, or have one pair."""
        pieces: list[list[int]] = []
        for i in run:
            if pieces and self._cost([*pieces[-1], i]) <= limit:
                pieces[-1].append(i)
            else:
                pieces.append([i])
        return [(piece, merged(piece, self.groups, self.examples)[0], self._cost(piece)) for piece in pieces]

    def _evenly(self, numbers: Sequence[int], count: int, most: int) -> list[list[int]]:
        """In `count` parts of at most `most` items, about as many in each; between two examples where that can be."""
        total = len(numbers)
        between = {end for end in range(1, total) if self.examples[numbers[end - 1]] != self.examples[numbers[end]]}
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
        return [list(numbers[start:end]) for start, end in pairwise(ends)]
