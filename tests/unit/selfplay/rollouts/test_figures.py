"""Figures of rollouts: what is counted, and over what."""

from __future__ import annotations

import math
from array import array

import pytest

from nemo_spin.generation.interface import Response
from nemo_spin.selfplay.pairs import Rollout
from nemo_spin.selfplay.rollouts.figures import RolloutFigures, is_repeated

STOP = 2


def test_every_response_is_counted_by_what_it_is() -> None:
    chosen = (5, 6, STOP)
    figures = RolloutFigures()
    for ids, finish_reason, chosen_logp, rejected_logp in (
        ([STOP], "stop", -1.0, -2.0),
        ([7], "length", -1.0, -4.0),  # one token, but not the stop token alone
        ([5, 6, STOP], "stop", -1.0, -3.0),
        ([7, 8] * 10, "length", math.nan, -9.0),
    ):
        figures.add(Rollout(Response(0, array("i", ids), finish_reason), chosen_logp, rejected_logp), chosen)
    assert figures.num_tokens == 25
    assert figures.summary() == {
        "rollout/responses": 4,
        "rollout/length": 25 / 4,
        "rollout/entropy": (2.0 + 4.0 + 3.0) / 5,
        "rollout/finish_reason_stop": 0.5,
        "rollout/finish_reason_length": 0.5,
        "rollout/empty": 0.25,
        "rollout/repeated": 0.25,
        "rollout/exact_match": 0.25,
        "rollout/not_finite": 0.25,
    }


def test_no_rollouts_have_no_entropy() -> None:
    summary = RolloutFigures().summary()
    assert "rollout/entropy" not in summary and set(summary.values()) == {0.0}


@pytest.mark.parametrize(
    ("ids", "expected"), [([7, 8] * 7, False), ([7, 8] * 8, True), (range(16), False)], ids=["short", "loop", "varied"]
)
def test_a_long_response_that_goes_in_circles_is_repeated(ids: list[int], expected: bool) -> None:
    assert is_repeated(ids) == expected
