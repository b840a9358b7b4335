"""Micro-batches: nothing lost, within the budget, even over ranks."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_spin.megatron.micro_batches import Single, Size, cut, share_out
from nemo_spin.megatron.sequences import ResponseGroup

LENGTHS = st.tuples(st.integers(1, 50), st.integers(1, 200), st.integers(1, 200))


def singles(groups: list[ResponseGroup]) -> list[Single]:
    return [Single(group, number) for number, group in enumerate(groups)]


ITEMS = st.lists(LENGTHS, min_size=1, max_size=40).map(
    lambda lengths: singles([ResponseGroup(range(p), (range(c), range(r))) for p, c, r in lengths])
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(ITEMS, st.integers(1, 5), st.integers(1, 9), st.none() | st.integers(1, 2000), st.booleans())
def test_every_item_is_in_one_micro_batch_that_is_small_enough(
    items: list[Single], ranks: int, most: int, tokens: int | None, padded: bool
) -> None:
    by_rank = share_out(items, Size(most, tokens, padded), ranks)
    assert len(by_rank) == ranks
    assert len({len(own) for own in by_rank}) == 1
    batches = [batch for own in by_rank for batch in own]
    assert sorted(item.number for batch in batches for item in batch) == list(range(len(items)))
    for batch in filter(None, batches):
        if tokens is None:
            assert len(batch) <= most
        else:
            groups = [item.sequences for item in batch]
            longest = max(len(group.prompt_ids) + max(map(len, group.responses)) for group in groups)
            real = sum(len(group.prompt_ids) + sum(map(len, group.responses)) for group in groups)
            assert len(batch) == 1 or (2 * len(batch) * longest if padded else real) <= tokens
    # A rank without work is for want of items only.
    assert all(batches) or max(map(len, batches)) == 1


def test_a_budget_takes_as_few_micro_batches_as_it_allows_and_evens_them_out() -> None:
    groups = singles([ResponseGroup(range(10), (range(20), range(20)))] * 12)  # 50 packed, 60 padded tokens each
    assert [len(batch) for batch in cut(groups, Size(1, tokens=500))] == [6, 6]
    assert [len(batch) for batch in cut(groups, Size(1, tokens=500, padded=True))] == [6, 6]
    assert [len(batch) for batch in cut(groups, Size(1, tokens=350, padded=True))] == [4, 4, 4]
    assert [[len(batch) for batch in own] for own in share_out(groups, Size(1, tokens=500), 4)] == [[3]] * 4


def test_a_replica_without_items_has_no_micro_batches() -> None:
    assert cut([], Size(2)) == cut([], Size(2, tokens=100)) == []


def test_items_of_one_length_go_together_and_ranks_do_as_much() -> None:
    lengths = [200, 10, 100, 20, 190, 30, 110, 10]
    by_rank = share_out(singles([ResponseGroup((1,), (range(n),)) for n in lengths]), Size(2), 2)
    assert sorted(sorted(lengths[item.number] for item in batch) for own in by_rank for batch in own) == [
        [10, 10],
        [20, 30],
        [100, 110],
        [190, 200],
    ]
    work = [sum(lengths[item.number] for batch in own for item in batch) for own in by_rank]
    assert work == [410, 260]


@dataclass(frozen=True)
class Several:
    """Items that share a prompt and their first response; an item is (its number, tokens of its second response)."""

    prompt: int
    shared: int
    items: tuple[tuple[int, int], ...]

    @property
    def sequences(self) -> ResponseGroup:
        return ResponseGroup(range(self.prompt), (range(self.shared), *(range(length) for _, length in self.items)))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, items: slice) -> Several:
        return Several(self.prompt, self.shared, self.items[items])


def groups_of(lengths: list[tuple[int, int, list[int]]]) -> list[Several]:
    """Of (tokens of the prompt, of the shared response, of each other response)."""
    groups, count = [], 0
    for prompt, shared, others in lengths:
        items = tuple(enumerate(sorted(others, reverse=True), start=count))
        groups.append(Several(prompt, shared, items))
        count += len(items)
    return groups


def numbers(batches: list[list[Several]]) -> list[list[int]]:
    return [[number for group in batch for number, _ in group.items] for batch in batches]


SEVERAL = st.lists(
    st.tuples(st.integers(1, 50), st.integers(1, 200), st.lists(st.integers(1, 200), min_size=1, max_size=6)),
    min_size=1,
    max_size=15,
).map(groups_of)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(SEVERAL, st.integers(1, 5), st.integers(1, 9), st.none() | st.integers(1, 2000), st.booleans(), st.booleans())
def test_items_of_a_group_go_together_as_far_as_they_may(
    groups: list[Several], ranks: int, most: int, tokens: int | None, padded: bool, copied: bool
) -> None:
    size = Size(most, tokens, padded, copied)
    by_rank = share_out(groups, size, ranks)
    assert len({len(own) for own in by_rank}) == 1
    batches = [batch for own in by_rank for batch in own]
    count = sum(map(len, groups))
    assert sorted(number for batch in numbers(batches) for number in batch) == list(range(count))
    whole = {number: group for group in groups for number, _ in group.items}
    for batch in filter(None, batches):
        # What there is of a group is one part of it, with its items in their order.
        assert len({id(whole[part.items[0][0]]) for part in batch}) == len(batch)
        for part in batch:
            of = whole[part.items[0][0]]
            start = of.items.index(part.items[0])
            assert part == of[start : start + len(part)]
        # One item that is too long goes alone; of several, none does.
        items = sum(map(len, batch))
        assert items == 1 or (items <= most if tokens is None else size.cost(batch) <= tokens)
    assert all(batches) or max(map(len, numbers(batches))) == 1
    if tokens is None:
        assert len(batches) == -(-count // (most * ranks)) * ranks


@settings(max_examples=200, deadline=None, derandomize=True)
@given(ITEMS, st.integers(1, 5), st.integers(1, 9), st.none() | st.integers(1, 2000), st.booleans())
def test_where_every_group_has_one_item_nothing_changes(
    items: list[Single], ranks: int, most: int, tokens: int | None, padded: bool
) -> None:
    groups = [
        Several(len(item.sequences.prompt_ids), len(chosen), ((item.number, len(other)),))
        for item in items
        for chosen, other in [item.sequences.responses]
    ]
    size = Size(most, tokens, padded)
    expected = [[[item.number for item in batch] for batch in own] for own in share_out(items, size, ranks)]
    assert [numbers(own) for own in share_out(groups, size, ranks)] == expected


def alike(sizes: list[int]) -> list[Several]:
    """Groups of so many items; the first are the longest."""
    return groups_of([(100 - i, 20, [20] * size) for i, size in enumerate(sizes)])


def test_groups_are_split_only_where_they_have_to_be() -> None:
    groups = alike([3] * 7)
    # 8 micro-batches for two ranks: six groups of three are whole, the last is shared.
    assert list(map(len, numbers(cut(groups, Size(3), 2)))) == [3] * 6 + [1, 2]
    assert list(map(len, numbers(cut(groups, Size(6))))) == [6, 3, 6, 6]
    # Keeping them whole would take seven.
    assert len(cut(groups, Size(4))) == 6
    assert numbers(cut(alike([5]), Size(2))) == [[0], [1, 2], [3, 4]]


def test_a_budget_counts_what_is_shared_once_and_splits_a_group_that_is_over_it() -> None:
    groups = alike([3])  # a prompt of 100, a shared response of 20, three of 20
    assert numbers(cut(groups, Size(1, tokens=180))) == [[0, 1, 2]]
    assert numbers(cut(groups, Size(1, tokens=179))) == [[0, 1], [2]]
    assert numbers(cut(groups, Size(1, tokens=480, padded=True))) == [[0, 1, 2]]
    assert numbers(cut(groups, Size(1, tokens=480, copied_prompts=True))) == [[0, 1, 2]]
    assert numbers(cut(groups, Size(1, tokens=479, copied_prompts=True))) == [[0, 1], [2]]
    assert numbers(cut(groups, Size(1, tokens=50))) == [[0], [1], [2]]
    # Alone, an item costs 140: three of them would not fit.
    assert numbers(cut([groups[0][i : i + 1] for i in range(3)], Size(1, tokens=419))) == [[0, 1], [2]]
