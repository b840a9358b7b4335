"""What every generation engine takes and gives: requests in, responses and statistics out, all as token ids."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from nemo_spin.generation.rules import Rules


@dataclass(frozen=True)
class GenerationRequest:
    """index: identifies the prompt in all randomness. max_new_tokens: further limited by what the context leaves.

    sample: number of the response among those to this prompt, each with random numbers of its own.
    """

    index: int
    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    sample: int = 0


Key = tuple[int, int]
"""Identifies a response: the index of its prompt, and its number among the responses to that prompt, from 0."""


@dataclass(frozen=True, slots=True)
class Response:
    """A generated response.

    index, sample: of its request.
    ids: token ids as sampled, with the stop token if one was sampled; int32, 4 bytes a token. They are never changed.
    finish_reason: "stop", or "length" when the response was truncated by its budget.
    """

    index: int
    ids: array[int]
    finish_reason: str
    sample: int = 0

    @property
    def key(self) -> Key:
        return self.index, self.sample


@dataclass
class Statistics:
    """What the last call of `Engine.generate` cost, in this model-parallel group.

    generated_tokens: tokens of all responses.
    decode_steps: forward passes with one token per row. row_steps: rows in these passes that made a token of a
    response. decoded_slots: rows that these passes computed, whether they were of use or not.
    prefills: passes over prompts. prefill_tokens: tokens that they computed; prefill_padding: those of them that were
    padding.
    preempted_rows: how often a row gave up its place in the cache, to be read again later.
    peak_cache_bytes: bytes of keys and values that this rank held at most.
    """

    generated_tokens: int = 0
    decode_steps: int = 0
    row_steps: int = 0
    decoded_slots: int = 0
    prefills: int = 0
    prefill_tokens: int = 0
    prefill_padding: int = 0
    preempted_rows: int = 0
    peak_cache_bytes: int = 0

    @property
    def useful_share(self) -> float:
        """Share of the decoded slots that became tokens of responses; 1 where nothing was decoded."""
        return self.row_steps / self.decoded_slots if self.decoded_slots else 1.0


class Engine(Protocol):
    """Generates responses with the weights that its model has when `generate` is called.

    Made of (model, rules, slots, kv_cache_gib):
    model: this rank's chunk of the model; there is only one (no virtual pipeline).
    rules: what the responses depend on.
    slots: rows decoded at a time, under pipeline parallelism in each of the groups in flight. None: as many as the
        cache holds, up to MOST_SLOTS.
    kv_cache_gib: GiB that keys and values take on each process at most. None: a share of the memory that is free.

    statistics: of the last call.
    """

    rules: Rules
    statistics: Statistics

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        iteration: int,
        progress: Callable[[int], None] | None = None,
        finished: Callable[[Response], None] | None = None,
        interrupted: Callable[[], bool] | None = None,
    ) -> list[Response]:
        """Responses in the order of the requests. Every rank of the model-parallel group passes the same requests.

        progress: told how many more are finished. finished: given each response as soon as it is, on every rank.
        interrupted: asked again and again whether to end at once, by every rank of the model-parallel group equally
            often, and has to answer alike on all of them; if so, only the responses that are finished are returned.

        Raises DataError if a prompt leaves no room for a response, UserError if the model's logits are not finite.
        The model is then, as after success, in the state in which it was.
        """
        ...
