"""Where a run stands: the part of its state that is counted, not computed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields


@dataclass
class Progress:
    """Position in the run; all counts start from 0.

    iteration: round of self-play.
    iteration_step: optimizer steps done in this iteration, over all its epochs.
    step: optimizer steps done in the whole run.
    consumed_samples: pairs trained on in the whole run, with those of skipped steps.
    skipped_steps: steps of the whole run that updated nothing, because loss or gradient were not finite.
    skipped_in_a_row: how many of the last steps were skipped, over the bounds of iterations.

    Skipped steps are steps in all other counts: their batches are not trained on again.
    """

    iteration: int = 0
    iteration_step: int = 0
    step: int = 0
    consumed_samples: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0

    def __str__(self) -> str:
        return f"iteration {self.iteration}, after step {self.step}"

    def advance(self, samples: int, skipped: bool = False) -> None:
        """Count an optimizer step on `samples` pairs."""
        self.iteration_step += 1
        self.step += 1
        self.consumed_samples += samples
        self.skipped_steps += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0

    @property
    def policy_is_reference(self) -> bool:
        """Whether no step of this iteration has updated the policy yet."""
        return self.skipped_in_a_row >= self.iteration_step

    def next_iteration(self) -> None:
        self.iteration += 1
        self.iteration_step = 0

    def state_dict(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: dict[str, int]) -> Progress:
        """The inverse of `state_dict`. Checkpoints of before there were skipped steps do not count them."""
        skips = {"skipped_steps": 0, "skipped_in_a_row": 0}
        return cls(**{field.name: int((skips | state)[field.name]) for field in fields(cls)})
