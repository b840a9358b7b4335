"""Collation: the response mask covers the stop token, and neither prompt nor padding. Which responses make pairs."""

from __future__ import annotations

import math
from array import array

import pytest

from nemo_spin.generation.interface import Response
from nemo_spin.megatron.sequences import collate
from nemo_spin.runtime.progress import Progress
from nemo_spin.selfplay.pairs import Rollout, Selection


def test_mask_is_aligned_with_tokens_and_covers_the_stop_token() -> None:
    stop, pad = 9, 0
    batch = collate([(1, 2, 3), (4,)], [(5, stop), (6, 7, 8, stop)], pad, multiple_of=4)
    assert batch.tokens.tolist() == [[1, 2, 3, 5, 9, 0, 0, 0], [4, 6, 7, 8, 9, 0, 0, 0]]
    assert batch.response_mask.int().tolist() == [[0, 0, 0, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 0, 0, 0]]
    assert batch.prompt_lengths.tolist() == [3, 1]
    assert batch.sequence_lengths.tolist() == [5, 5]


def test_a_pad_id_that_is_the_stop_token_does_not_hide_it() -> None:
    stop = 9
    batch = collate([(1,), (1,)], [(stop,), (2, 3, stop)], pad_id=stop)
    assert batch.tokens[0].tolist() == [1, 9, 9, 9]
    assert batch.response_mask[0].int().tolist() == [0, 1, 0, 0]


def test_progress_survives_its_state_dict() -> None:
    progress = Progress()
    progress.advance(8)
    progress.next_iteration()
    progress.advance(5)
    restored = Progress.from_state_dict(progress.state_dict())
    assert restored == progress == Progress(iteration=1, iteration_step=1, step=2, consumed_samples=13)


def test_skipped_steps_are_counted_in_a_row_and_survive_too() -> None:
    progress = Progress()
    moved = []
    for skipped in (True, True, False, True):
        moved.append(not progress.policy_is_reference)
        progress.advance(8, skipped)
    assert moved == [False, False, False, True]
    progress.next_iteration()
    assert progress.policy_is_reference
    progress.advance(8, skipped=True)
    assert progress.policy_is_reference, "the step of the iteration before is none of this one"
    restored = Progress.from_state_dict(progress.state_dict())
    assert (restored.skipped_steps, restored.skipped_in_a_row, restored.consumed_samples) == (4, 2, 40)
    older = {"iteration": 1, "iteration_step": 2, "step": 8, "consumed_samples": 64}
    assert Progress.from_state_dict(older) == Progress(1, 2, 8, 64)


def rollout(logp: float, length: int = 4) -> Rollout:
    return Rollout(Response(0, array("i", [5] * length), "stop"), -1.0, logp)


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (Selection(), [0, 1, 2]),
        (Selection("best"), [1]),
        (Selection("worst"), [0]),
        (Selection("best", per_token=True), [0]),
        (Selection("worst", per_token=True), [1]),
    ],
)
def test_which_responses_become_rejected(selection: Selection, expected: list[int]) -> None:
    rollouts = [rollout(logp, length) for logp, length in ((-9.0, 10), (-5.0, 2), (-6.0, 3))]
    assert selection(rollouts) == [rollouts[number] for number in expected]


@pytest.mark.parametrize("rejected", ["best", "worst"])
def test_a_response_without_a_finite_log_probability_is_the_last_choice(rejected: str) -> None:
    select = Selection(rejected)
    for broken in (math.nan, math.inf, -math.inf):
        bad, good = rollout(broken), rollout(-3.0)
        assert select([bad, good])[0] is good
        assert select([bad, rollout(broken)])[0] is bad
