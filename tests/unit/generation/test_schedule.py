"""Rows are batched without gaps, none is lost, no slot idles for long, and the cache is never too full."""

from __future__ import annotations

import random
from typing import Any

import pytest

from nemo_spin.generation.cache import round_up
from nemo_spin.generation.rows import Row
from nemo_spin.generation.schedule import Schedule, Waiting

MUCH = 10**9


def rows_of(lengths: list[int], budget: int = 1) -> list[Row]:
    return [Row(order=i, prompt_ids=(i,) * length, key=i, budget=budget) for i, length in enumerate(lengths)]


def schedule_of(rows: list[Row], slots: int, cache_tokens: int = MUCH, **options: Any) -> Schedule:
    return Schedule(Waiting(rows), slots, cache_tokens, **options)


@pytest.mark.parametrize("slots", [1, 3, 16])
def test_moves_keep_every_row_in_its_slot(slots: int) -> None:
    choice = random.Random(slots)
    rows = rows_of([choice.randint(1, 9) for _ in range(60)])
    schedule = schedule_of(rows, slots, prefill_tokens=20)
    cache: list[Row | None] = [None] * slots
    finished: list[Row] = []
    refill = max(1, slots // 8)
    while len(finished) < len(rows):
        waiting = len(rows) - len(finished) - len(schedule.active)
        admitted = schedule.admit()
        for slot, row in enumerate(admitted, start=len(schedule.active) - len(admitted)):
            assert row not in cache[: len(schedule.active) - len(admitted)]
            cache[slot] = row
        if not admitted:
            assert slots - len(schedule.active) < refill or waiting == 0 or waiting > slots - len(schedule.active)
        longest = max((len(row.prompt_ids) for row in admitted), default=0)
        assert len(admitted) == 1 or longest * len(admitted) <= 20
        for row in schedule.active:
            if choice.random() < 0.3:
                row.finish_reason = "stop"
        gone, preempted, moves = schedule.leave()
        assert not preempted
        finished += gone
        for source, destination in moves:
            cache[destination] = cache[source]
        assert cache[: len(schedule.active)] == schedule.active
        assert all(row.finish_reason is None for row in schedule.active)
    assert sorted(row.order for row in finished) == list(range(60))


def test_a_few_free_slots_wait_for_more_while_others_decode() -> None:
    schedule = schedule_of(rows_of([1] * 40), slots=16)
    assert len(schedule.admit()) == 16
    assert schedule.admit() == []
    schedule.active[3].finish_reason = "stop"
    schedule.leave()
    assert schedule.admit() == []
    schedule.active[0].finish_reason = "length"
    schedule.leave()
    assert len(schedule.admit()) == 2


def test_the_last_waiting_rows_do_not_wait_for_company() -> None:
    schedule = schedule_of(rows_of([1] * 17), slots=16)
    schedule.admit()
    schedule.active[3].finish_reason = "stop"
    schedule.leave()
    assert len(schedule.admit()) == 1


def test_the_longest_prompts_come_first() -> None:
    schedule = schedule_of(rows_of([2, 9, 5, 9]), slots=2)
    assert [row.order for row in schedule.admit()] == [1, 3]


# ------------------------------------------------------------------------------------------ several of one prompt


def samples_of(lengths: list[int], samples: int) -> list[Row]:
    """Samples of each prompt one after the other, orders counting them."""
    rows = rows_of([length for length in lengths for _ in range(samples)])
    for row in rows:
        row.prompt_ids = (row.order // samples,) * len(row.prompt_ids)
    return rows


def test_rows_with_the_same_prompt_are_neighbours_in_any_order() -> None:
    rows = samples_of([3, 3, 5, 3], 4)
    for i, row in enumerate(rows):
        row.order, row.budget = (i * 7) % 16, 1 + i % 3
    waiting = Waiting(sorted(rows, key=lambda row: row.order))
    prompts = [waiting.take().prompt_ids for _ in rows]
    assert len(prompts[0]) == 5
    assert all(len(set(prompts[i : i + 4])) == 1 for i in range(0, 16, 4))


def test_without_the_same_prompts_the_order_is_what_it_was() -> None:
    choice = random.Random(5)
    rows = rows_of([choice.randint(1, 5) for _ in range(60)])
    for row in rows:
        row.budget = choice.randint(1, 3)
    waiting = Waiting(rows)
    expected = sorted(rows, key=lambda row: (-row.length, -row.budget, row.order))
    assert [waiting.take() for _ in rows] == expected


def test_prefill_tokens_count_what_is_read_once() -> None:
    schedule = schedule_of(samples_of([5] * 4, 4), slots=64, prefill_tokens=10)
    assert [row.order for row in schedule.admit()] == list(range(8))


def test_samples_come_together_where_few_slots_have_to_wait_for_it() -> None:
    # 3 of 11 slots are worth a prefill, so up to 3 samples of a prompt are kept together.
    for samples, admitted in ((3, 9), (4, 11)):
        schedule = schedule_of(samples_of([5] * 9, samples), slots=11, refill=3)
        assert len(schedule.admit()) == admitted


def test_more_samples_than_slots_come_to_their_end() -> None:
    rows = samples_of([5] * 3, 7)
    schedule = schedule_of(rows, slots=4)
    finished: list[Row] = []
    while len(finished) < len(rows):
        schedule.admit()
        for row in schedule.active:
            row.finish_reason = "stop"
        finished += schedule.leave()[0]
    assert sorted(row.order for row in finished) == list(range(21))


@pytest.mark.parametrize("cache_tokens", [160, 400, 1500])
def test_the_cache_is_never_too_full_and_every_row_comes_to_its_end(cache_tokens: int) -> None:
    preemptions = sum(with_a_full_cache(random.Random(seed), cache_tokens) for seed in range(8))
    assert (preemptions > 0) == (cache_tokens < 1500)


def with_a_full_cache(choice: random.Random, cache_tokens: int) -> int:
    """Two groups that share what waits; returns how many rows had to give way."""
    rows = rows_of([choice.randint(1, 60) for _ in range(40)], budget=100)
    lengths = [choice.choice((1, 5, 30, 100)) for _ in rows]
    waiting = Waiting(rows)
    groups = [Schedule(waiting, 8, cache_tokens) for _ in range(2)]
    finished, preemptions, steps = [], 0, 0
    while len(finished) < len(rows):
        for group in groups:
            steps += 1
            group.admit()
            if not group.active:
                continue
            rows_now, oldest = len(group.active), group._arrivals[0]
            assert len(set(map(id, group.active))) == rows_now <= 8
            assert rows_now * round_up(group.longest) <= cache_tokens
            assert round_up(group.longest) <= group.capacity
            assert rows_now * group.capacity <= cache_tokens
            for row in group.active:
                row.append(0)
                row.finish_reason = "length" if len(row.ids) == lengths[row.order] else None
            gone, preempted, _ = group.leave()
            finished += gone
            preemptions += len(preempted)
            assert oldest not in preempted
            assert all(row.finish_reason is None for row in preempted)
    assert sorted(row.order for row in finished) == list(range(len(rows)))
    assert [len(row.ids) for row in rows] == lengths
    # Each row alone would take as many steps.
    assert steps < 2 * sum(lengths)
    return preemptions


def test_what_came_last_goes_back_and_is_the_next_to_come() -> None:
    rows = rows_of([16, 16, 16], budget=200)
    schedule = schedule_of(rows, slots=3, cache_tokens=288)
    assert schedule.admit() == rows
    for _ in range(81):
        rows[0].append(0)  # 97 in the end, of which the cache has room for 3 times 96
    assert schedule.leave() == ([], [rows[2]], [])
    assert schedule.active == rows[:2]
    assert schedule.admit() == []
    rows[0].finish_reason = rows[1].finish_reason = "stop"
    schedule.leave()
    assert schedule.admit() == [rows[2]]
