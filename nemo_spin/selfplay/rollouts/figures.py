"""Figures of an iteration's rollouts: how long the responses are, how they end, and how many are degenerate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nemo_spin.selfplay.pairs import Rollout, has_finite_logps

# A response of at least this many tokens counts as repeated when less than half of its runs of four tokens differ.
_REPEATED_FROM_TOKENS = 16
_RUN = 4


@dataclass(slots=True)
class RolloutFigures:
    """Counts over rollouts, updated with each one that is added.

    responses: number of rollouts. num_tokens: of all their responses.
    """

    responses: int = 0
    num_tokens: int = 0
    _truncated: int = 0
    _empty: int = 0
    _repeated: int = 0
    _exact_matches: int = 0
    _not_finite: int = 0
    _finite_logps: float = 0.0
    _finite_tokens: int = 0

    def add(self, rollout: Rollout, chosen_ids: Sequence[int]) -> None:
        """chosen_ids: the human response to the same prompt."""
        ids, is_truncated = rollout.response.ids, rollout.response.finish_reason == "length"
        self.responses += 1
        self.num_tokens += len(ids)
        self._truncated += is_truncated
        # A stop token alone says nothing.
        self._empty += len(ids) == 1 and not is_truncated
        self._repeated += is_repeated(ids)
        self._exact_matches += tuple(ids) == tuple(chosen_ids)
        if has_finite_logps(rollout):
            self._finite_logps += rollout.ref_rejected_logps
            self._finite_tokens += len(ids)
        else:
            self._not_finite += 1

    def summary(self) -> dict[str, float]:
        """`rollout/*`: `responses`, their number; `length`, mean tokens; `entropy`, minus the mean log-probability of a
        token under the reference, in nats, if any is finite; and shares of the responses: ended by a stop token,
        truncated by the length limit, empty, repeated (see `is_repeated`), equal to the human response, and those of
        pairs whose log-probabilities are not finite."""
        count = max(self.responses, 1)
        shares = {
            "finish_reason_stop": self.responses - self._truncated,
            "finish_reason_length": self._truncated,
            "empty": self._empty,
            "repeated": self._repeated,
            "exact_match": self._exact_matches,
            "not_finite": self._not_finite,
        }
        entropy = {"rollout/entropy": -self._finite_logps / self._finite_tokens} if self._finite_tokens else {}
        return {
            "rollout/responses": float(self.responses),
            "rollout/length": self.num_tokens / count,
            **entropy,
            **{f"rollout/{name}": number / count for name, number in shares.items()},
        }


def is_repeated(ids: Sequence[int]) -> bool:
    """Whether a response repeats itself: fewer than half of its runs of four tokens are distinct."""
    if len(ids) < _REPEATED_FROM_TOKENS:
        return False
    runs = [tuple(ids[i : i + _RUN]) for i in range(len(ids) - _RUN + 1)]
    return 2 * len(set(runs)) < len(runs)
