"""Rollouts and pairs: a response that the reference has generated and scored, and that response with its example."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nemo_spin.data.example import Example
from nemo_spin.generation.interface import Response
from nemo_spin.megatron.sequences import ResponseGroup


@dataclass(frozen=True, slots=True)
class Rollout:
    """A generated response (rejected), scored by the reference together with the human response (chosen).

    ref_chosen_logps, ref_rejected_logps: log-probability of each whole response under the reference, in nats.
    """

    response: Response
    ref_chosen_logps: float
    ref_rejected_logps: float


@dataclass(frozen=True, slots=True)
class Pair:
    """An example with a rollout to its prompt: what is trained on.

    rejected_ids, finish_reason: those of the `Response`. ref_chosen_logps, ref_rejected_logps: as in `Rollout`.
    """

    example: Example
    rejected_ids: tuple[int, ...]
    finish_reason: str
    ref_chosen_logps: float
    ref_rejected_logps: float

    @classmethod
    def of(cls, example: Example, rollout: Rollout) -> Pair:
        response = rollout.response
        return cls(
            example,
            tuple(response.ids),
            response.finish_reason,
            rollout.ref_chosen_logps,
            rollout.ref_rejected_logps,
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of the two sequences that go through the model."""
        return 2 * len(self.example.prompt_ids) + len(self.example.response_ids) + len(self.rejected_ids)


@dataclass(frozen=True, slots=True)
class Selection:
    """Which rollouts of an example become rejected responses.

    rejected: "all", or the one to which the reference gives the highest ("best") or lowest ("worst") log-probability.
    per_token: compare mean log-probabilities per token rather than sums.
    """

    rejected: str = "all"
    per_token: bool = False

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """Select from all rollouts of an example. One without a finite log-probability is selected only if all lack it.

        Returns: the selected rollouts, in the order given.
        """
        return list(rollouts) if self.rejected == "all" else [max(rollouts, key=self._score)]

    def _score(self, rollout: Rollout) -> float:
        logp = rollout.ref_rejected_logps / (len(rollout.response.ids) if self.per_token else 1)
        if not math.isfinite(logp):
            return -math.inf
        return logp if self.rejected == "best" else -logp


def trainable(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs whose reference log-probabilities are finite: a loss with any other pair in it is NaN.

    Returns all pairs if none is finite: the step is then skipped, and counted like other skipped steps.
    """
    return [pair for pair in pairs if has_finite_logps(pair)] or list(pairs)


def has_finite_logps(scored: Rollout | Pair) -> bool:
    """Whether both log-probabilities under the reference are finite."""
    return math.isfinite(scored.ref_chosen_logps) and math.isfinite(scored.ref_rejected_logps)


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
