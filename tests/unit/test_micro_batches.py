"""Micro-batches: nothing lost, within the budget, even over ranks."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_spin.micro_batches import Size, cut, share_out
from nemo_spin.pairs import ResponseGroup

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
