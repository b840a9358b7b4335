"""The arithmetic of steps."""

from __future__ import annotations

import dataclasses

import pytest

from nemo_spin.config import EquilibriumConfig, LoopConfig
from nemo_spin.runtime.progress import Progress
from nemo_spin.selfplay.schedule import Schedule

LOOP = LoopConfig(
    max_iterations=3, max_epochs=(2, 2, 2), max_steps=-1, val_check_interval=0, save_interval=0,
    limit_train_batches=1.0, limit_val_batches=1.0, gradient_clip_val=1.0, max_seconds=None, log_samples=0,
    max_skipped_steps=3, hang_timeout=0.0, stop_at_equilibrium=EquilibriumConfig(None, None, None, None),
)  # fmt: skip


def plan(pairs: tuple[int, ...] = (100, 100, 100), window: int | None = None, **loop: object) -> Schedule:
    return Schedule(dataclasses.replace(LOOP, **loop), 8, pairs, window)


def test_the_last_batch_of_an_epoch_may_be_smaller() -> None:
    assert (plan().batches_per_epoch(0), plan().steps_per_iteration(0)) == (13, 26)


def test_what_is_left() -> None:
    at = Progress(iteration=1, iteration_step=4, step=30)
    assert (plan().left_in_iteration(at), plan().left_in_run(at), plan().windows_left(at)) == (22, 48, 1)
    # max_steps counts the whole run
    limited = plan(max_steps=32)
    assert (limited.left_in_iteration(at), limited.left_in_run(at)) == (2, 2)
    assert limited.left_in_run(Progress(iteration=1, iteration_step=6, step=32)) == 0
    assert plan().left_in_run(Progress(iteration=3, step=78)) == 0


def test_iterations_of_different_lengths() -> None:
    """More pairs from the second one on, which are replayed, and epochs of their own."""
    uneven = plan(pairs=(100, 200, 210), max_epochs=(1, 2, 3), window=80)
    assert [uneven.steps_per_iteration(iteration) for iteration in range(3)] == [13, 50, 81]
    assert [uneven.left_in_run(Progress(iteration=i, iteration_step=1)) for i in range(3)] == [143, 130, 80]
    assert uneven.left_in_iteration(Progress(iteration=1, iteration_step=49)) == 1
    assert [uneven.windows_left(Progress(iteration=i)) for i in range(3)] == [6, 3, 0]
    assert uneven.is_due(1.0, Progress(iteration=1, iteration_step=25))
    assert not uneven.is_due(1.0, Progress(iteration=0, iteration_step=25))


@pytest.mark.parametrize(("window", "batches", "windows"), [(None, 26, 1), (8, 1, 13), (40, 5, 3), (8000, 1000, 1)])
def test_windows_of_rollouts(window: int | None, batches: int, windows: int) -> None:
    windowed = plan(window=window)
    assert (windowed.batches_per_window(0), windowed.windows_per_iteration(0)) == (batches, windows)


@pytest.mark.parametrize(
    ("interval", "steps"),
    [(0, []), (-1, []), (10, [10, 20]), (1.0, [13, 26]), (0.25, list(range(3, 27, 3))), (0.001, list(range(1, 27)))],
)
def test_what_is_due(interval: int | float, steps: list[int]) -> None:
    assert [i for i in range(1, 27) if plan().is_due(interval, Progress(iteration_step=i, step=100 + i))] == steps


def test_a_window_ends_where_it_would_have_without_an_interruption() -> None:
    windowed = plan(window=32)
    assert [windowed.left_in_window(Progress(iteration_step=step)) for step in range(6)] == [4, 3, 2, 1, 4, 3]
    assert plan().left_in_window(Progress(iteration_step=5)) == 26 - 5
