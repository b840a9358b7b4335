"""Which pairs an epoch has: counted by hand, and the same whenever it is asked for."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch

from nemo_spin.data.order import Share, epoch_order
from nemo_spin.selfplay.replay import Replay

REPLAY = Replay(
    shares=(Share(20, 1.0),),
    global_batch_size=8,
    max_epochs=(2, 1, 3, 1),
    limit_train_batches=1.0,
    pairs_per_example=1,
    replay_weights=(1.0,),
    seed=3,
    shuffle=True,
)


def replay(**changes: object) -> Replay:
    return dataclasses.replace(REPLAY, **changes)


def ids(mixed: Replay, iteration: int, epoch: int = 0) -> list[tuple[int, ...]]:
    rows = [tuple(row) for row in mixed.epoch(iteration, epoch).tolist()]
    assert len(rows) == mixed.pairs_per_epoch(iteration)
    return rows


def test_the_first_iteration_has_only_its_own_pairs_in_the_order_of_the_data() -> None:
    order = epoch_order(20, 3, 0, 1, True).tolist()
    assert ids(REPLAY, 0, 1) == [(0, index, 0) for index in order]


def test_later_ones_have_all_pairs_of_the_iteration_before_once_more() -> None:
    rows = ids(REPLAY, 1)
    assert Counter(rows) == Counter([(age, index, 0) for age in (0, 1) for index in range(20)])
    ages = [age for age, _, _ in rows]
    assert ages != sorted(ages), "they are mixed, not one after the other"
    assert ids(replay(replay_weights=()), 1) == [(0, index, 0) for index in epoch_order(20, 3, 1, 0, True).tolist()]


def test_weights_are_passes_over_a_generation() -> None:
    weighted = replay(replay_weights=(0.25, 1.5))
    assert [weighted.pairs_per_epoch(iteration) for iteration in range(4)] == [20, 25, 55, 55]
    ages = Counter(age for age, _, _ in ids(weighted, 2))
    assert ages == {0: 20, 1: 5, 2: 30}
    times = Counter(index for age, index, _ in ids(weighted, 2) if age == 2)
    assert sorted(times.values()) == [1] * 10 + [2] * 10
    drawn = [{index for age, index, _ in ids(weighted, 2, epoch) if age == 1} for epoch in range(3)]
    assert len(set(map(frozenset, drawn))) == 3, "each epoch draws anew"


def test_what_is_replayed_was_trained_on_before() -> None:
    limited = replay(limit_train_batches=1, max_epochs=(1, 2, 1, 1))
    assert limited.examples_per_epoch == 8
    made = set(limited.examples(0, 0).tolist())
    for epoch in (0, 1):
        rows = ids(limited, 1, epoch)
        assert {index for age, index, _ in rows if age == 1} == made
        assert len([age for age, _, _ in rows if age == 0]) == 8


def test_each_epoch_replays_one_of_the_iteration_before() -> None:
    """All that it was trained on comes again, also where no epoch had all of it."""
    halves = replay(shares=(Share(20, 0.5),), max_epochs=(2, 3, 1, 1))
    replayed = [{index for age, index, _ in ids(halves, 1, epoch) if age == 1} for epoch in range(3)]
    assert replayed == [set(halves.examples(0, epoch).tolist()) for epoch in (0, 1, 0)]
    assert len(replayed[0] | replayed[1]) == 20


@pytest.mark.parametrize("shuffle", [True, False])
def test_the_pairs_of_an_example_follow_each_other(shuffle: bool) -> None:
    several = replay(pairs_per_example=3, shuffle=shuffle)
    assert (several.pairs_per_epoch(0), several.pairs_per_epoch(1)) == (60, 120)
    rows = ids(several, 1)
    assert len(set(rows)) == 120
    for start in range(0, 120, 3):
        age, index, _ = rows[start]
        assert rows[start : start + 3] == [(age, index, number) for number in range(3)]


def test_a_limit_counts_batches_of_pairs() -> None:
    assert replay(pairs_per_example=3, limit_train_batches=3).pairs_per_epoch(0) == 24
    assert replay(pairs_per_example=9, limit_train_batches=1).pairs_per_epoch(0) == 9, "one example at least"
    assert replay(limit_train_batches=0.5).pairs_per_epoch(0) == 8


def test_an_epoch_is_a_function_of_seed_iteration_and_epoch() -> None:
    orders = {tuple(ids(replay(seed=seed), i, e)) for seed in (1, 2) for i in (1, 2) for e in (0, 1)}
    assert len(orders) == 8
    assert torch.equal(REPLAY.epoch(2, 1), replay().epoch(2, 1))


def test_fractions_of_files_go_on_over_epochs_of_different_number() -> None:
    halves = replay(shares=(Share(20, 0.5),), replay_weights=())
    seen = [set(halves.examples(i, e).tolist()) for i, epochs in enumerate(halves.max_epochs) for e in range(epochs)]
    for first, second in zip(seen[::2], seen[1::2], strict=False):
        assert len(first | second) == 20
