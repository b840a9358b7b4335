"""Prompts with their responses as token ids, and the padded batches that the model sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ResponseGroup:
    """A prompt with one or more responses to it, as token ids: what is trained on or scored together."""

    prompt_ids: Sequence[int]
    responses: tuple[Sequence[int], ...]

    @classmethod
    def merged(cls, groups: Sequence[ResponseGroup]) -> ResponseGroup:
        """Of groups that share the prompt and the first response: these once, then the second response of each."""
        first = groups[0]
        return cls(first.prompt_ids, (*first.responses, *(group.responses[1] for group in groups[1:])))

    @property
    def packed_tokens(self) -> int:
        """Tokens of the prompt, once, and of all responses."""
        return len(self.prompt_ids) + sum(map(len, self.responses))

    @property
    def longest(self) -> int:
        """Tokens of the prompt and the longest response."""
        return len(self.prompt_ids) + max(map(len, self.responses))


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Right-padded sequences of prompt and response.

    tokens: int64 [b, s].
    response_mask: bool [b, s], aligned with tokens: true on every response token with its stop token,
        false on prompt and padding.
    prompt_lengths, sequence_lengths: int64 [b], in tokens.
    """

    tokens: Tensor
    response_mask: Tensor
    prompt_lengths: Tensor
    sequence_lengths: Tensor

    def to(self, device: torch.device) -> TokenBatch:
        return TokenBatch(
            self.tokens.to(device),
            self.response_mask.to(device),
            self.prompt_lengths.to(device),
            self.sequence_lengths.to(device),
        )


def collate(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_id: int, multiple_of: int = 1
) -> TokenBatch:
    """Pad prompts and their responses on the right to one length, a multiple of `multiple_of`."""
    prompt_lengths = torch.tensor([len(prompt) for prompt in prompts])
    sequence_lengths = prompt_lengths + torch.tensor([len(response) for response in responses])
    length = -(-int(sequence_lengths.max()) // multiple_of) * multiple_of
    tokens = torch.full((len(prompts), length), pad_id, dtype=torch.int64)
    for row, prompt, response in zip(tokens, prompts, responses, strict=True):
        ids = [*prompt, *response]
        row[: len(ids)] = torch.tensor(ids)
    positions = torch.arange(length)
    response_mask = (positions >= prompt_lengths[:, None]) & (positions < sequence_lengths[:, None])
    return TokenBatch(tokens, response_mask, prompt_lengths, sequence_lengths)
