"""Rows are batched without gaps, none is lost, and no slot idles for long."""

from __future__ import annotations

import random

import pytest

from nemo_spin.generation.schedule import Row, Schedule


def rows_of(lengths: list[int]) -> list[Row]:
    return [Row(order=i, prompt_ids=(i,) * length, key=i, budget=1) for i, length in enumerate(lengths)]


@pytest.mark.parametrize("slots", [1, 3, 16])
def test_moves_keep_every_row_in_its_slot(slots: int) -> None:
    choice = random.Random(slots)
    rows = rows_of([choice.randint(1, 9) for _ in range(60)])
    schedule = Schedule(rows, slots, prefill_tokens=20)
    cache: list[Row | None] = [None] * slots
    finished: list[Row] = []
    refill = max(1, slots // 8)
    while not schedule.done:
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
        gone, moves = schedule.retire()
        finished += gone
        for source, destination in moves:
            cache[destination] = cache[source]
        assert cache[: len(schedule.active)] == schedule.active
        assert all(row.finish_reason is None for row in schedule.active)
    assert sorted(row.order for row in finished) == list(range(60))


def test_a_few_free_slots_wait_for_more_while_others_decode() -> None:
    schedule = Schedule(rows_of([1] * 40), slots=16)
    assert len(schedule.admit()) == 16
    assert schedule.admit() == []
    schedule.active[3].finish_reason = "stop"
    schedule.retire()
    assert schedule.admit() == []
    schedule.active[0].finish_reason = "length"
    schedule.retire()
    assert len(schedule.admit()) == 2


def test_the_last_waiting_rows_do_not_wait_for_company() -> None:
    schedule = Schedule(rows_of([1] * 17), slots=16)
    schedule.admit()
    schedule.active[3].finish_reason = "stop"
    schedule.retire()
    assert len(schedule.admit()) == 1


def test_the_longest_prompts_come_first() -> None:
    schedule = Schedule(rows_of([2, 9, 5, 9]), slots=2)
    assert [row.order for row in schedule.admit()] == [1, 3]
