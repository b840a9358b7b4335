"""The layout of packed sequences, and gradients through a gather."""

from __future__ import annotations

import torch

from nemo_spin.megatron.packing import gather_rows, packed, padded, response_order
from nemo_spin.megatron.sequences import ResponseGroup

GROUPS = [ResponseGroup((1, 2), ((11, 12, 13), (21,))), ResponseGroup((3,), ((31, 32), (41, 42, 43, 44)))]


def test_packed_tokens_attend_to_their_prompt_and_themselves() -> None:
    batch = packed(GROUPS, pad_id=0, multiple_of=5)
    assert batch.tokens.tolist() == [[1, 2, 11, 12, 13, 21, 3, 31, 32, 41, 42, 43, 44, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 2, 0, 1, 2, 1, 2, 3, 4, 0, 0]]
    rows, start = [], 0
    slots = batch.tokens[0][batch.rows.index]
    assert slots[batch.rows.slot_of_token].tolist() == batch.tokens[0].tolist()
    filled = torch.cat([here for here, _ in batch.rows.shares])
    slots = torch.zeros_like(slots).index_copy(0, filled, slots[filled])
    for count, length in batch.rows.shapes:
        rows += slots[start : start + count * length].view(count, length).tolist()
        start += count * length
    real = sorted([token for token in row if token] for row in rows)
    assert real == [[1, 2, 11, 12, 13], [1, 2, 21], [3, 31, 32], [3, 41, 42, 43, 44]]


def test_both_layouts_ask_for_the_same_tokens_after_the_same_ones() -> None:
    asked = [11, 12, 13, 31, 32, 21, 41, 42, 43, 44]
    after = [2, 11, 12, 3, 31, 2, 3, 41, 42, 43]
    for batch in (padded(GROUPS, 0), packed(GROUPS, 0), packed(GROUPS, 0, share_prompts=False)):
        assert batch.targets.ids.tolist() == asked
        assert batch.tokens.T.flatten()[batch.targets.predictors].tolist() == after
        assert batch.targets.lengths == (3, 2, 1, 4)
        rows = batch.targets.by_response(batch.targets.ids).tolist()
        assert rows == [[11, 12, 13, 0], [31, 32, 0, 0], [21, 0, 0, 0], [41, 42, 43, 44]]
    assert response_order(GROUPS) == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert packed(GROUPS, 0, 4, share_prompts=False).lengths == (5, 3, 3, 5)


def test_padding_is_no_target_and_a_stop_token_is_one_even_if_it_has_the_same_id() -> None:
    stop = 9
    groups = [ResponseGroup((1, 2, 3), ((5, stop),)), ResponseGroup((4,), ((6, 7, 8, stop),))]
    batch = padded(groups, pad_id=stop, multiple_of=4)
    assert batch.tokens.tolist() == [[1, 2, 3, 5, 9, 9, 9, 9], [4, 6, 7, 8, 9, 9, 9, 9]]
    for layout in (batch, packed(groups, pad_id=stop, multiple_of=4)):
        assert layout.targets.ids.tolist() == [5, stop, 6, 7, 8, stop]
        assert layout.tokens.T.flatten()[layout.targets.predictors].tolist() == [3, 5, 4, 6, 7, 8]


def test_what_is_gathered_twice_gets_both_gradients() -> None:
    batch = packed(GROUPS, 0)
    for index, shares in ((batch.rows.index, batch.rows.shares), (batch.targets.predictors, batch.targets.shares)):
        x = torch.randn(13, 3, dtype=torch.float64, requires_grad=True)
        grad = torch.zeros(len(index), 3, dtype=torch.float64)
        for here, _ in shares:
            grad[here] = torch.randn(len(here), 3, dtype=torch.float64)
        gather_rows(x, index, shares).backward(grad)
        expected = torch.zeros(13, 3, dtype=torch.float64).index_add(0, index, grad)
        torch.testing.assert_close(x.grad, expected)


def test_several_responses_to_a_prompt_attend_to_it_and_come_share_by_share() -> None:
    groups = [ResponseGroup((1, 2), ((11,), (21, 22), (31,))), ResponseGroup((3,), ((41, 42), (51,)))]
    for batch in (padded(groups, 0), packed(groups, 0), packed(groups, 0, share_prompts=False)):
        assert batch.targets.ids.tolist() == [11, 41, 42, 21, 22, 51, 31]
        assert batch.tokens.T.flatten()[batch.targets.predictors].tolist() == [2, 3, 41, 2, 21, 3, 2]
        assert batch.targets.lengths == (1, 2, 2, 1, 1)
    assert packed(groups, 0).tokens.tolist() == [[1, 2, 11, 21, 22, 31, 3, 41, 42, 51]]
    # Of the THD form each response has a copy, the shared chosen one is there once.
    copied = packed(groups, 0, share_prompts=False)
    assert copied.tokens.tolist() == [[1, 2, 11, 3, 41, 42, 1, 2, 21, 22, 3, 51, 1, 2, 31]]
    assert copied.lengths == (3, 3, 4, 2, 3)
