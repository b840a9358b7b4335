"""What responses depend on beside their requests and the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_spin.config import SamplingParams


@dataclass(frozen=True)
class Rules:
    """The rules by which every engine generates: with the same ones they make the same responses, up to rounding.

    sampling: how a token is chosen.
    vocab_size: ids from here on are padding of the embedding and never sampled.
    max_sequence_length: tokens of prompt and response together, at most.
    seed: of all random numbers; any integer.
    min_length: tokens of a response, 0 or more, before which nothing ends it but its budget.
    stop_ids: a response ends with the first of these, which belongs to it.
    should_stop: asked after each token, with the ids of the response so far, whether it ends here; has to answer alike
        on every rank. It looks for the `end_strings` of `sampling`, by which `settings` knows it.
    """

    sampling: SamplingParams
    vocab_size: int
    max_sequence_length: int
    seed: int
    min_length: int = 0
    stop_ids: frozenset[int] = frozenset()
    should_stop: Callable[[Sequence[int]], bool] | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The rules as JSON has them: rollouts made under other ones are not used again."""
        return {
            "seed": self.seed,
            "vocab_size": self.vocab_size,
            "max_sequence_length": self.max_sequence_length,
            "min_length": self.min_length,
            "stop_ids": sorted(self.stop_ids),
            **asdict(self.sampling),
        }

    def finish_reason(self, ids: Sequence[int], budget: int) -> str | None:
        """Why a response ends with its last token: "stop", or "length" where it has `budget` tokens; None if not."""
        if ids[-1] in self.stop_ids:
            return "stop"
        if self.should_stop is not None and len(ids) >= self.min_length and self.should_stop(ids):
            return "stop"
        return "length" if len(ids) == budget else None
