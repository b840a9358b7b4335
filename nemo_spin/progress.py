"""Where a run stands: the part of its state that is counted, not computed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields


@dataclass
class Progress:
    """Position in the run; all counts start from 0.

    iteration: round of self-play.
    iteration_step: optimizer steps done in this iteration, over all its epochs.
    step: optimizer steps done in the whole run.
    consumed_samples: pairs trained on in the whole run.
    """

    iteration: int = 0
    iteration_step: int = 0
    step: int = 0
    consumed_samples: int = 0

    def advance(self, samples: int) -> None:
        """Count an optimizer step on `samples` pairs."""
        self.iteration_step += 1
        self.step += 1
        self.consumed_samples += samples

    def next_iteration(self) -> None:
        self.iteration += 1
        self.iteration_step = 0

    def state_dict(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: dict[str, int]) -> Progress:
        return cls(**{field.name: int(state[field.name]) for field in fields(cls)})
