"""What a run tells the console, the metrics and the report beside numbers: warnings and sampled responses."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GuardWarning:
    """What a guard has seen. guard: its key. text: what, how much, the threshold and what to try, in one sentence."""

    guard: str
    text: str


@dataclass(frozen=True, slots=True)
class Sample:
    """A rollout for people: texts of the prompt, the human response and the generated one."""

    index: int
    prompt: str
    chosen: str
    rejected: str
    finish_reason: str
