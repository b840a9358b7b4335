"""What self-play asks of a model, so that nothing in this folder knows the class that NeMo restores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from nemo_spin.data.example import Example
from nemo_spin.selfplay.non_finite import Diagnosis
from nemo_spin.selfplay.pairs import Pair
from nemo_spin.selfplay.rollouts.roll_out import Answer, Rollout


class Policy(Protocol):
    """A model that is trained, with the reference that it plays against.

    Every process calls every method, at the same point of the run and with the same arguments; each gets the result.
    """

    def decode(self, ids: Sequence[int]) -> str:
        """Token ids as text, for people."""
        ...

    # ------------------------------------------------------------------------------------------ rollouts

    def rollout_settings(self, iteration: int) -> dict[str, Any]:
        """What the rollouts of an iteration depend on beside weights and prompts, as JSON has it."""
        ...

    def roll_out(
        self,
        examples: Sequence[Example],
        iteration: int,
        progress: Callable[[str, int], None] | None = None,
        **hooks: Any,
    ) -> list[Rollout] | None:
        """The reference's responses to these prompts, at the iteration's temperature, and its log-probabilities of them
        and of the human ones. See `rollouts.roll_out`."""
        ...

    def score_given(
        self,
        examples: Sequence[Example],
        answers: Sequence[Sequence[Answer]],
        progress: Callable[[str, int], None] | None = None,
    ) -> list[Rollout]:
        """Rollouts of responses that are there already, scored by the reference. See `rollouts.score`."""
        ...

    def given_answer(self, ids: Sequence[int]) -> Answer:
        """A response that the data bring along, in place of one that the reference made; not empty."""
        ...

    def refresh_reference(self) -> str:
        """The policy becomes the reference. Returns a name of its weights, see `Reference.name`."""
        ...

    # ------------------------------------------------------------------------------------------ steps

    def start_lr_schedule(self, lr: float, total_steps: int, steps_done: int, fresh: bool) -> None:
        """Begin a learning-rate schedule, or resume it after `steps_done` steps. fresh: reset the optimizer's state."""
        ...

    def train_step(self, pairs: Sequence[Pair], beta: float) -> dict[str, float]:
        """One optimizer step on a global batch. Returns its metrics, see `spin_step`."""
        ...

    def diagnose(self, pairs: Sequence[Pair]) -> Diagnosis:
        """What is not finite after a `train_step` on these pairs that was skipped."""
        ...

    def validation_step(self, examples: Sequence[Example]) -> tuple[float, int]:
        """(summed NLL in nats, number) of the response tokens of a global batch."""
        ...

    def spin_validation_step(self, pairs: Sequence[Pair], beta: float) -> dict[str, float]:
        """SPIN's metrics of a global batch of held-out pairs, summed over them."""
        ...

    def peak_memory(self) -> int:
        """The most memory in bytes that this process has held so far, on the GPU, or resident on the CPU."""
        ...
