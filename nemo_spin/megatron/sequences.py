"""Examples, pairs and the padded batches that the model sees.

A prompt is rendered and tokenized once; chosen and rejected share its ids.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt with its human response.

    index: position in its data set, from 0: the identity of the sample in all randomness.
    prompt_ids: token ids of the rendered prompt.
    response_ids: token ids of the human response (chosen), its stop token included.
    """

    index: int
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Pair:
    """An example with the reference's own response to the same prompt (rejected).

    rejected_ids: generated ids as sampled, with the stop token if one was sampled.
    finish_reason: "stop", or "length" when the response was cut off at its length limit.
    ref_chosen_logps, ref_rejected_logps: log-probability of each response under the reference, in nats.
    """

    example: Example
    rejected_ids: tuple[int, ...]
    finish_reason: str
    ref_chosen_logps: float
    ref_rejected_logps: float

    @property
    def num_tokens(self) -> int:
        """Tokens of the two sequences that go through the model."""
        return 2 * len(self.example.prompt_ids) + len(self.example.response_ids) + len(self.rejected_ids)


@dataclass(frozen=True, slots=True)
class Selection:
    """Which of the responses to a prompt become rejected ones.

    rejected: "all", or the one to which the reference gives the highest ("best") or lowest ("worst") log-probability.
    per_token: the mean log-probability of its tokens counts, not their sum.
    """

    rejected: str = "all"
    per_token: bool = False

    def __call__(self, logps: Sequence[float], lengths: Sequence[int]) -> list[int]:
        """logps: of each response under the reference, in nats. lengths: in tokens. Returns numbers of responses.

        One whose log-probability is not finite is taken only where all are so.
        """
        samples = range(len(logps))
        if self.rejected == "all":
            return list(samples)
        sign = 1.0 if self.rejected == "best" else -1.0
        scores = [sign * logp / (length if self.per_token else 1) for logp, length in zip(logps, lengths, strict=True)]
        return [max(samples, key=lambda i: scores[i] if math.isfinite(scores[i]) else -math.inf)]


@dataclass(frozen=True, slots=True)
class ResponseGroup:
    """A prompt with one or more responses to it, as token ids: what is trained on or scored together."""

    prompt_ids: Sequence[int]
    responses: tuple[Sequence[int], ...]

    @classmethod
    def of_example(cls, example: Example) -> ResponseGroup:
        return cls(example.prompt_ids, (example.response_ids,))

    @classmethod
    def of_pair(cls, pair: Pair) -> ResponseGroup:
        """Chosen first, then rejected."""
        return cls(pair.example.prompt_ids, (pair.example.response_ids, pair.rejected_ids))

    @classmethod
    def merged(cls, groups: Sequence[ResponseGroup]) -> ResponseGroup:
        """Of pairs of one example: their prompt and chosen response once, then the rejected one of each pair."""
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
