"""Responses in the making, and what they depend on, whichever engine makes them: their random numbers, how long they
may become, and what ends them."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from nemo_spin.errors import DataError, UserError
from nemo_spin.generation.interface import GenerationRequest, Response
from nemo_spin.generation.noise import sample_key
from nemo_spin.generation.sampling import NO_TOKEN

if TYPE_CHECKING:
    from nemo_spin.config import SamplingParams


@dataclass(eq=False)
class Row:
    """A response in the making.

    order: its place among the requests. key: of its random numbers. budget: tokens at most.
    ids: the tokens so far. length: tokens of prompt and response. finish_reason: None until it is finished.
    """

    order: int
    prompt_ids: tuple[int, ...]
    key: int
    budget: int
    ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    # Counted along, because it is asked for at every step of every row.
    length: int = field(init=False)

    def __post_init__(self) -> None:
        self.length = len(self.prompt_ids) + len(self.ids)

    def append(self, token: int) -> None:
        self.ids.append(token)
        self.length += 1

    @property
    def longest(self) -> int:
        """Tokens of prompt and response at most."""
        return len(self.prompt_ids) + self.budget

    def reads_as(self, other: Row) -> bool:
        """Whether the model has read the same tokens so far, so that it need not read them twice."""
        return self.length == other.length and self.ids == other.ids and self.prompt_ids == other.prompt_ids


class Rules:
    """What responses depend on beside their requests and the weights. The arguments are those of `Generator`."""

    def __init__(
        self,
        vocab_size: int,
        max_sequence_length: int,
        sampling: SamplingParams,
        min_length: int,
        stop_ids: frozenset[int],
        seed: int,
        should_stop: Callable[[Sequence[int]], bool] | None,
    ) -> None:
        self.stop_ids = stop_ids
        self._max_sequence_length, self._min_length = max_sequence_length, min_length
        self._seed, self._should_stop = seed, should_stop
        self.temperature = sampling.temperature
        self._settings: dict[str, Any] = {
            "seed": seed,
            "vocab_size": vocab_size,
            "max_sequence_length": max_sequence_length,
            "min_length": min_length,
            "stop_ids": sorted(stop_ids),
            **asdict(sampling),
        }

    @property
    def settings(self) -> dict[str, Any]:
        """See `Engine.settings`."""
        return {**self._settings, "temperature": self.temperature}

    def rows(self, requests: Sequence[GenerationRequest], iteration: int) -> list[Row]:
        """The rows of these requests, in their order. Raises DataError if a prompt leaves no room for a response."""
        return [self._row(order, request, iteration) for order, request in enumerate(requests)]

    def _row(self, order: int, request: GenerationRequest, iteration: int) -> Row:
        budget = min(request.max_new_tokens, self._max_sequence_length - len(request.prompt_ids))
        if budget < 1 or not request.prompt_ids:
            raise DataError(
                f"Sample {request.index} cannot be answered: its prompt has {len(request.prompt_ids)} tokens, at most "
                f"{request.max_new_tokens} new ones are asked for, and a sequence holds {self._max_sequence_length}."
            )
        key = sample_key(self._seed, iteration, request.index, request.sample)
        return Row(order, request.prompt_ids, key, budget)

    def extend(self, row: Row, token: int) -> None:
        """Give the row its next token, and see whether it ends it. Raises UserError where none could be sampled."""
        if token == NO_TOKEN:
            raise UserError(
                "The model's logits are not finite, or no token is left to choose from: check its weights, the "
                "learning rate, and the sampling parameters."
            )
        row.append(token)
        row.finish_reason = self._finish_reason(row)

    def _finish_reason(self, row: Row) -> str | None:
        if row.ids[-1] in self.stop_ids:
            return "stop"
        if self._should_stop is not None and len(row.ids) >= self._min_length and self._should_stop(row.ids):
            return "stop"
        return "length" if len(row.ids) == row.budget else None


def distinct(rows: Sequence[Row]) -> tuple[list[Row], list[int]]:
    """The rows that have to be read: of those that read the same, the first. And, for every row, its place in them."""
    places: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    read, copies = [], []
    for row in rows:
        place = places.setdefault((row.prompt_ids, tuple(row.ids)), len(read))
        if place == len(read):
            read.append(row)
        copies.append(place)
    return read, copies


def response_of(request: GenerationRequest, row: Row) -> Response:
    """Of a row that is finished."""
    assert row.finish_reason is not None
    return Response(request.index, array("i", row.ids), row.finish_reason, request.sample)


def finished_responses(requests: Sequence[GenerationRequest], rows: Sequence[Row]) -> list[Response]:
    """In the order of the requests."""
    return [response_of(requests[row.order], row) for row in rows if row.finish_reason is not None]
