"""Where the time goes, on a clock that the test turns."""

from __future__ import annotations

import pytest

from nemo_spin.runtime.timing import Stopwatch, in_words


def test_activities_are_measured_apart() -> None:
    now = 100.0
    watch = Stopwatch(clock=lambda: now)
    for activity, seconds in (("rollout", 6.0), ("train_step", 1.0), ("train_step", 2.0)):
        with watch.measure(activity):
            now += seconds
    now += 1.0
    assert watch.last == {"rollout": 6.0, "train_step": 2.0}
    assert (watch.total["train_step"], watch.mean("train_step"), watch.mean("validation")) == (3.0, 1.5, 0.0)
    assert watch.share("rollout") == pytest.approx(0.6)


def test_what_ended_by_an_exception_does_not_count() -> None:
    watch = Stopwatch()
    with pytest.raises(ZeroDivisionError), watch.measure("rollout"):
        raise ZeroDivisionError
    assert watch.total["rollout"] == 0.0


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0s"), (59.6, "1m 00s"), (450, "7m 30s"), (7530, "2h 05m"), (3 * 86400 + 4 * 3600 + 59, "3d 04h")],
)
def test_time_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words
