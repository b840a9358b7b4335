"""Lays prompts and their responses out as the token ids that go through the model together.

Padded, every response is a row of its own behind a copy of its prompt, filled up on the right. Packed, all of them lie
one behind the other in a single row without padding, and the responses to a prompt share it: each attends to the prompt
and to itself, and its positions go on from the prompt's. What a response's tokens see is the same, so their
log-probabilities and gradients are too; what differs is how often the rest of the model computes the prompt.

Responses come share by share: the first response of every group, then the second ones. Within a share no token comes
twice, so that gradients can be added up without atomics, in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor

from nemo_spin.megatron.sequences import ResponseGroup

# Rows of attention are padded to one length as long as no more than this share of it is padding.
_MOST_PADDING = 0.2

Share = tuple[Tensor, Tensor]
"""(where in a gathered tensor, where it comes from in the tensor that is gathered from), both int64 and unique."""


@dataclass(frozen=True, slots=True)
class Targets:
    """The response tokens, response after response, and what predicts them.

    ids: int64 [n]. predictors: int64 [n], indices into hidden states [s * b]: of the token before each.
    shares: see `gather_rows`. lengths: tokens of each response. cells: int64 [n], indices into [responses * longest].
    """

    ids: Tensor
    predictors: Tensor
    shares: tuple[Share, ...]
    lengths: tuple[int, ...]
    cells: Tensor

    def by_response(self, values: Tensor) -> Tensor:
        """[n] -> [responses, longest], 0 behind the end of each response."""
        rows, longest = len(self.lengths), max(self.lengths)
        return values.new_zeros(rows * longest).index_copy(0, self.cells, values).view(rows, longest)


@dataclass(frozen=True, slots=True)
class AttentionRows:
    """Which packed tokens attend to which: rows of prompt and response, each causal and padded on the right.

    index: int64 [slots], the token in each slot of all rows; anything where a row is padded. shares: see `gather_rows`.
    shapes: (rows, slots in each) of the blocks that the rows make up, of about one length each.
    slot_of_token: int64 [T], a slot that holds each token. tokens: int64 [T], all of them in order.
    """

    index: Tensor
    shares: tuple[Share, ...]
    shapes: tuple[tuple[int, int], ...]
    slot_of_token: Tensor
    tokens: Tensor


@dataclass(frozen=True, slots=True)
class ModelInput:
    """What goes through the model together.

    tokens, positions: int64 [b, s]. targets: what is asked for. rows: of packed tokens, [1, T]; None where they are
    padded. lengths: tokens of each sequence where they are packed without sharing a prompt (see `packed`), else None.
    """

    tokens: Tensor
    positions: Tensor
    targets: Targets
    rows: AttentionRows | None = None
    lengths: tuple[int, ...] | None = None


def padded(groups: Sequence[ResponseGroup], pad_id: int, multiple_of: int = 1) -> ModelInput:
    """Each response in a row of its own, [responses, s], s a multiple of `multiple_of`."""
    responses = [(group.prompt_ids, response) for group, response, _ in _in_shares(groups)]
    lengths = [len(prompt) + len(response) for prompt, response in responses]
    rows, longest = len(lengths), -(-max(lengths) // multiple_of) * multiple_of
    sequences = zip(responses, lengths, strict=True)
    tokens = torch.tensor([[*prompt, *ids, *[pad_id] * (longest - length)] for (prompt, ids), length in sequences])
    # Hidden states are [s, b].
    where = [torch.arange(length) * rows + row for row, length in enumerate(lengths)]
    positions = torch.arange(longest).expand(rows, longest)
    return ModelInput(tokens, positions, _targets(where, responses, [0] * rows))


def packed(
    groups: Sequence[ResponseGroup], pad_id: int, multiple_of: int = 1, share_prompts: bool = True
) -> ModelInput:
    """All tokens in one row, [1, T], T a multiple of `multiple_of`: the few tokens of padding follow the last response.

    share_prompts: else each response gets a copy of its prompt, and `lengths` says where sequences end, which is all
    that attention of the THD form knows; the padding is then part of the last sequence.
    """
    if not share_prompts:
        groups = [ResponseGroup(group.prompt_ids, (response,)) for group, response, _ in _in_shares(groups)]
    ids: list[int] = []
    positions: list[int] = []
    of_group = []
    for group in groups:
        prompt = range(len(ids), len(ids) + len(group.prompt_ids))
        ids += group.prompt_ids
        positions += range(len(prompt))
        of_response = []
        for response in group.responses:
            of_response.append(torch.tensor([*prompt, *range(len(ids), len(ids) + len(response))]))
            ids += response
            positions += range(len(prompt), len(prompt) + len(response))
        of_group.append(of_response)
    in_shares = _in_shares(groups)
    where = [of_group[number][share] for number, share in response_order(groups)]
    shares = [share for _, _, share in in_shares]
    targets = _targets(where, [(group.prompt_ids, response) for group, response, _ in in_shares], shares)

    padding = torch.arange(len(ids), len(ids) + -len(ids) % multiple_of)
    ids += [pad_id] * len(padding)
    positions += [0] * len(padding)
    tokens, at = torch.tensor([ids]), torch.tensor([positions])
    if not share_prompts:
        lengths = [len(row) for row in where]
        lengths[-1] += len(padding)
        return ModelInput(tokens, at, targets, lengths=tuple(lengths))
    # Behind its end no token of the last response sees them.
    where[-1] = torch.cat([where[-1], padding])
    return ModelInput(tokens, at, targets, _attention_rows(where, shares, len(ids)))


def gather_rows(x: Tensor, index: Tensor, shares: tuple[Share, ...]) -> Tensor:
    """x [m, ...] -> x[index], [n, ...]. Its gradient is added up without atomics: the same sums whenever it is run.

    index: int64 [n]. shares: which elements of the result have a gradient, and where they come from, divided so that
    nothing comes twice within a share.
    """
    return _Gather.apply(x, index, shares)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, shares: tuple[Share, ...]) -> Tensor:
        ctx.rows, ctx.shares = x.shape[0], shares
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        total = grad.new_zeros(ctx.rows, *grad.shape[1:])
        for number, (here, source) in enumerate(ctx.shares):
            part = grad.index_select(0, here)
            if number:
                part += total.index_select(0, source)
            total.index_copy_(0, source, part)
        return total, None, None


def response_order(groups: Sequence[ResponseGroup]) -> list[tuple[int, int]]:
    """(number of the group, number of the response in it) of every response, as `padded` and `packed` order them."""
    most = max(len(group.responses) for group in groups)
    return [(i, share) for share in range(most) for i, group in enumerate(groups) if share < len(group.responses)]


def _in_shares(groups: Sequence[ResponseGroup]) -> list[tuple[ResponseGroup, Sequence[int], int]]:
    return [(groups[i], groups[i].responses[share], share) for i, share in response_order(groups)]


def _targets(
    where: Sequence[Tensor], responses: Sequence[tuple[Sequence[int], Sequence[int]]], shares: Sequence[int]
) -> Targets:
    """where: the places of each response's prompt and tokens in the hidden states.

    This is the one place where outputs are shifted against tokens.
    """
    before = [row[:-1][-len(ids) :] if ids else row[:0] for row, (_, ids) in zip(where, responses, strict=True)]
    # Without a prompt nothing predicts the first token.
    ids = [torch.tensor(ids[len(ids) - len(b) :]) for b, (_, ids) in zip(before, responses, strict=True)]
    lengths = tuple(len(b) for b in before)
    longest = max(lengths)
    starts = [0, *accumulate(lengths)]
    predictors = torch.cat(before)
    parts = []
    for _, rows in groupby(range(len(before)), key=shares.__getitem__):
        numbers = list(rows)
        here = torch.arange(starts[numbers[0]], starts[numbers[-1] + 1])
        parts.append((here, predictors[here]))
    cells = torch.cat([torch.arange(row * longest, row * longest + n) for row, n in enumerate(lengths)])
    return Targets(torch.cat(ids).long(), predictors, tuple(parts), lengths, cells)


def _attention_rows(where: Sequence[Tensor], shares: Sequence[int], total: int) -> AttentionRows:
    index, shapes = [], []
    slots_of: dict[int, Tensor] = {}
    end = 0
    for block in _blocks([len(row) for row in where]):
        longest = len(where[block[0]])
        for number in block:
            row = where[number]
            slots_of[number] = torch.arange(end, end + len(row))
            index += [row, torch.zeros(longest - len(row), dtype=torch.int64)]
            end += longest
        shapes.append((len(block), longest))
    slot_of_token = torch.empty(total, dtype=torch.int64)
    for number in reversed(range(len(where))):
        slot_of_token[where[number]] = slots_of[number]
    parts = []
    for _, rows in groupby(range(len(where)), key=shares.__getitem__):
        numbers = list(rows)
        parts.append((torch.cat([slots_of[i] for i in numbers]), torch.cat([where[i] for i in numbers])))
    return AttentionRows(torch.cat(index), tuple(parts), tuple(shapes), slot_of_token, torch.arange(total))


def _blocks(lengths: Sequence[int]) -> list[list[int]]:
    """Numbers of rows in blocks, the longest first, that are padded to the length of their longest row."""
    blocks: list[list[int]] = []
    real = 0
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        real += lengths[number]
        if not blocks or real < (1 - _MOST_PADDING) * lengths[blocks[-1][0]] * (len(blocks[-1]) + 1):
            blocks.append([])
            real = lengths[number]
        blocks[-1].append(number)
    return blocks
