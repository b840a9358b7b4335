"""Prompts with their responses, as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ResponseGroup:
    """A prompt with one or more responses to it, as token ids: what is trained on or scored together."""

    prompt_ids: Sequence[int]
    responses: tuple[Sequence[int], ...]

    @property
    def packed_tokens(self) -> int:
        """Tokens of the prompt, once, and of all responses."""
        return len(self.prompt_ids) + sum(map(len, self.responses))

    @property
    def longest(self) -> int:
        """Tokens of the prompt and the longest response."""
        return len(self.prompt_ids) + max(map(len, self.responses))
