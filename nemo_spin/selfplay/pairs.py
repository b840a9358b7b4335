"""Pairs: a human response (chosen) and a generated one (rejected) to the same prompt, whose ids they share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nemo_spin.data.example import Example
from nemo_spin.megatron.sequences import ResponseGroup


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


def trainable(pairs: Sequence[Pair]) -> list[Pair]:
    """Those whose reference log-probabilities are finite: a loss that holds one of the others is NaN.

    All of them where none is: the step is then skipped, and counted like others that are.
    """
    finite = [pair for pair in pairs if math.isfinite(pair.ref_chosen_logps) and math.isfinite(pair.ref_rejected_logps)]
    return finite or list(pairs)


def group_of_example(example: Example) -> ResponseGroup:
    """The prompt with its human response."""
    return ResponseGroup(example.prompt_ids, (example.response_ids,))


def group_of_pair(pair: Pair) -> ResponseGroup:
    """The prompt with its chosen response, then the rejected one."""
    return PairGroup((pair,)).sequences


@dataclass(frozen=True, slots=True)
class PairGroup:
    """Pairs of one example, the longest first: prompt and chosen response go through the model once for all of them.

    A `megatron.micro_batches.Group`, whose items are the pairs.
    """

    pairs: tuple[Pair, ...]

    @property
    def sequences(self) -> ResponseGroup:
        """The prompt with the chosen response, then the rejected ones."""
        example = self.pairs[0].example
        return ResponseGroup(example.prompt_ids, (example.response_ids, *(pair.rejected_ids for pair in self.pairs)))

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, items: slice) -> PairGroup:
        return PairGroup(self.pairs[items])


def groups_of_pairs(pairs: Sequence[Pair]) -> list[PairGroup]:
    """Pairs by example, in the order in which the longest pair of each example comes in `pairs`."""
    numbers: dict[Example, list[int]] = {}
    for number, pair in enumerate(pairs):
        numbers.setdefault(pair.example, []).append(number)
    longest_first = [sorted(own, key=lambda number: -len(pairs[number].rejected_ids)) for own in numbers.values()]
    return [PairGroup(tuple(pairs[number] for number in own)) for own in sorted(longest_first)]
