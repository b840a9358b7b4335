"""Which responses make pairs, and pairs of one example together."""

from __future__ import annotations

import math
from array import array

import pytest

from nemo_spin.data.example import Example
from nemo_spin.generation.interface import Response
from nemo_spin.megatron.sequences import ResponseGroup
from nemo_spin.runtime.progress import Progress
from nemo_spin.selfplay.pairs import Pair, PairGroup, Rollout, Selection, groups_of_pairs
from nemo_spin.selfplay.step import pair_rows


def pair(index: int, chosen: int, rejected: int) -> Pair:
    return Pair(Example(index, (1, 2), (3,) * chosen), (4,) * rejected, "stop", -1.0, -2.0)


def test_pairs_of_an_example_share_prompt_and_chosen_response() -> None:
    pairs = [pair(0, 1, 1), pair(1, 1, 2), pair(0, 1, 3), pair(0, 1, 1), pair(1, 1, 2)]
    # Example 1 comes first, because the longest pair of example 0 comes after it.
    second, first = groups_of_pairs(pairs)
    assert [id(own) for own in first.pairs] == [id(pairs[i]) for i in (2, 0, 3)]
    assert [id(own) for own in second.pairs] == [id(pairs[i]) for i in (1, 4)]
    assert first.sequences == ResponseGroup((1, 2), ((3,), (4, 4, 4), (4,), (4,)))
    assert (len(first), first[1:].pairs) == (3, first.pairs[1:])


def test_pairs_whose_chosen_responses_differ_are_apart() -> None:
    pairs = [pair(0, 1, 1), pair(0, 2, 1)]
    assert [group.pairs for group in groups_of_pairs(pairs)] == [(one,) for one in pairs]


def test_each_pair_finds_its_chosen_response_and_its_figures() -> None:
    groups = [PairGroup((pair(0, 3, 5), pair(0, 3, 4))), PairGroup((pair(1, 2, 1),))]
    rows = pair_rows(groups)
    assert rows.chosen.tolist() == [0, 1, 0]
    assert rows.tokens.tolist() == [[3, 5], [2, 1], [3, 4]]
    assert rows.reference.tolist() == [[-1, -2]] * 3
    assert [(here.tolist(), source.tolist()) for here, source in rows.shares] == [([0, 1], [0, 1]), ([2], [0])]


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
