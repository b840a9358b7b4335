"""Micro-batches: nothing lost, within the budget, even over ranks."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_spin.megatron.micro_batches import Size, by_example, cut, merged, share_out
from nemo_spin.megatron.sequences import ResponseGroup

LENGTHS = st.tuples(st.integers(1, 50), st.integers(1, 200), st.integers(1, 200))
GROUPS = st.lists(LENGTHS, min_size=1, max_size=40).map(
    lambda lengths: [ResponseGroup(range(p), (range(c), range(r))) for p, c, r in lengths]
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(GROUPS, st.integers(1, 5), st.integers(1, 9), st.none() | st.integers(1, 2000), st.booleans())
def test_every_item_is_in_one_micro_batch_that_is_small_enough(
    groups: list[ResponseGroup], ranks: int, items: int, tokens: int | None, padded: bool
) -> None:
    size = Size(items, tokens, padded)
    by_rank = share_out(groups, size, ranks)
    assert len(by_rank) == ranks
    assert len({len(own) for own in by_rank}) == 1
    batches = [batch for own in by_rank for batch in own]
    assert sorted(i for batch in batches for i in batch) == list(range(len(groups)))
    for batch in filter(None, batches):
        if tokens is None:
            assert len(batch) <= items
        else:
            longest = max(len(groups[i].prompt_ids) + max(map(len, groups[i].responses)) for i in batch)
            real = sum(len(groups[i].prompt_ids) + sum(map(len, groups[i].responses)) for i in batch)
            assert len(batch) == 1 or (2 * len(batch) * longest if padded else real) <= tokens
    # A rank without work is for want of items only.
    assert all(batches) or max(map(len, batches)) == 1


def test_a_budget_takes_as_few_micro_batches_as_it_allows_and_evens_them_out() -> None:
    groups = [ResponseGroup(range(10), (range(20), range(20))) for _ in range(12)]  # 50 packed, 60 padded tokens each
    assert [len(batch) for batch in cut(groups, Size(1, tokens=500))] == [6, 6]
    assert [len(batch) for batch in cut(groups, Size(1, tokens=500, padded=True))] == [6, 6]
    assert [len(batch) for batch in cut(groups, Size(1, tokens=350, padded=True))] == [4, 4, 4]
    assert [[len(batch) for batch in own] for own in share_out(groups, Size(1, tokens=500), 4)] == [[3]] * 4


def test_a_replica_without_items_has_no_micro_batches() -> None:
    assert cut([], Size(2)) == cut([], Size(2, tokens=100)) == []


def test_items_of_one_length_go_together_and_ranks_do_as_much() -> None:
    lengths = [200, 10, 100, 20, 190, 30, 110, 10]
    groups = [ResponseGroup((1,), (range(n),)) for n in lengths]
    by_rank = share_out(groups, Size(2), 2)
    assert sorted(sorted(lengths[i] for i in batch) for own in by_rank for batch in own) == [
        [10, 10],
        [20, 30],
        [100, 110],
        [190, 200],
    ]
    work = [sum(lengths[i] for batch in own for i in batch) for own in by_rank]
    assert work == [410, 260]


def pairs_of_examples(sizes: list[int]) -> tuple[list[ResponseGroup], list[int]]:
    """Pairs, as groups of two responses, of so many examples with so many pairs each; the first are the longest."""
    numbers = [number for number, size in enumerate(sizes) for _ in range(size)]
    return [ResponseGroup(range(100 - i), (range(20), range(20))) for i in numbers], numbers


SEVERAL = st.lists(
    st.tuples(st.integers(1, 50), st.integers(1, 200), st.lists(st.integers(1, 200), min_size=1, max_size=6)),
    min_size=1,
    max_size=15,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(SEVERAL, st.integers(1, 5), st.integers(1, 9), st.none() | st.integers(1, 2000), st.booleans(), st.booleans())
def test_pairs_of_an_example_go_together_as_far_as_they_may(
    lengths: list[tuple[int, int, list[int]]], ranks: int, items: int, tokens: int | None, padded: bool, copied: bool
) -> None:
    groups = [ResponseGroup(range(p), (range(c), range(r))) for p, c, rejected in lengths for r in rejected]
    examples = [number for number, (_, _, rejected) in enumerate(lengths) for _ in rejected]
    size = Size(items, tokens, padded, copied)
    by_rank = share_out(groups, size, ranks, examples)
    assert len({len(own) for own in by_rank}) == 1
    batches = [batch for own in by_rank for batch in own]
    assert sorted(i for batch in batches for i in batch) == list(range(len(groups)))
    for batch in filter(None, batches):
        runs = by_example(batch, examples)
        assert len({examples[run[0]] for run in runs}) == len(runs)
        together = merged(batch, groups, examples)
        assert [len(group.responses) - 1 for group in together] == [len(run) for run in runs]
        # One pair that is too long goes alone; of several, none does.
        assert len(batch) == 1 or (len(batch) <= items if tokens is None else size.cost(together) <= tokens)
    assert all(batches) or max(map(len, batches)) == 1
    if tokens is None:
        assert len(batches) == -(-len(groups) // (items * ranks)) * ranks


@settings(max_examples=200, deadline=None, derandomize=True)
@given(GROUPS, st.integers(1, 5), st.integers(1, 9), st.none() | st.integers(1, 2000), st.booleans())
def test_where_every_example_occurs_once_nothing_changes(
    groups: list[ResponseGroup], ranks: int, items: int, tokens: int | None, padded: bool
) -> None:
    size = Size(items, tokens, padded)
    assert share_out(groups, size, ranks, range(len(groups))) == share_out(groups, size, ranks)


def test_groups_are_parted_only_where_they_have_to_be() -> None:
    groups, examples = pairs_of_examples([3] * 7)
    # 8 micro-batches for two ranks: six groups of three are whole, the last is shared.
    assert [len(batch) for batch in cut(groups, Size(3), 2, examples)] == [3] * 6 + [1, 2]
    assert [len(batch) for batch in cut(groups, Size(6), 1, examples)] == [6, 3, 6, 6]
    # Keeping them whole would take seven.
    assert len(cut(groups, Size(4), 1, examples)) == 6
    groups, examples = pairs_of_examples([5])
    assert cut(groups, Size(2), 1, examples) == [[0], [1, 2], [3, 4]]


def test_a_budget_counts_what_is_shared_once_and_parts_a_group_that_is_over_it() -> None:
    groups, examples = pairs_of_examples([3])  # a prompt of 100, a chosen response of 20, three of 20
    assert cut(groups, Size(1, tokens=180), 1, examples) == [[0, 1, 2]]
    assert cut(groups, Size(1, tokens=179), 1, examples) == [[0, 1], [2]]
    assert cut(groups, Size(1, tokens=480, padded=True), 1, examples) == [[0, 1, 2]]
    assert cut(groups, Size(1, tokens=480, copied_prompts=True), 1, examples) == [[0, 1, 2]]
    assert cut(groups, Size(1, tokens=479, copied_prompts=True), 1, examples) == [[0, 1], [2]]
    assert cut(groups, Size(1, tokens=50), 1, examples) == [[0], [1], [2]]
    # Alone, a pair costs 140: three of them would not fit.
    assert cut(groups, Size(1, tokens=419)) == [[0, 1], [2]]


def test_merged_pairs_have_prompt_and_chosen_response_once() -> None:
    pairs = [ResponseGroup((1, 2), ((3,), rejected)) for rejected in ((4,), (5, 6), (4,))]
    other = ResponseGroup((1, 2), ((3,), (7,)))
    assert merged([0, 2, 1, 3], [*pairs, other], [0, 0, 0, 1]) == [
        ResponseGroup((1, 2), ((3,), (4,), (4,), (5, 6))),
        other,
    ]
