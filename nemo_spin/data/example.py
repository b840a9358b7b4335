"""A tokenized example of the training data: a prompt with its human response."""

from __future__ import annotations

from dataclasses import dataclass


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
