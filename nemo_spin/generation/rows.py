"""Responses in the making, whichever engine makes them."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from nemo_spin.errors import DataError, UserError
from nemo_spin.generation.interface import GenerationRequest, Response
from nemo_spin.generation.noise import sample_key
from nemo_spin.generation.rules import Rules
from nemo_spin.generation.sampling import NO_TOKEN


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


def rows_of(requests: Sequence[GenerationRequest], iteration: int, rules: Rules) -> list[Row]:
    """The rows of these requests, in their order. Raises DataError if a prompt leaves no room for a response."""
    return [_row(order, request, iteration, rules) for order, request in enumerate(requests)]


def _row(order: int, request: GenerationRequest, iteration: int, rules: Rules) -> Row:
    budget = min(request.max_new_tokens, rules.max_sequence_length - len(request.prompt_ids))
    if budget < 1 or not request.prompt_ids:
        raise DataError(
            f"Sample {request.index} cannot be answered: its prompt has {len(request.prompt_ids)} tokens, at most "
            f"{request.max_new_tokens} new ones are asked for, and a sequence holds {rules.max_sequence_length}."
        )
    key = sample_key(rules.seed, iteration, request.index, request.sample)
    return Row(order, request.prompt_ids, key, budget)


def extend(rows: Sequence[Row], tokens: Sequence[int], rules: Rules) -> None:
    """Give each row its next token, and see whether it ends it. Raises UserError where none could be sampled."""
    for row, token in zip(rows, tokens, strict=True):
        if token == NO_TOKEN:
            raise UserError(
                "The model's logits are not finite, or no token is left to choose from: check its weights, the "
                "learning rate, and the sampling parameters."
            )
        row.append(token)
        row.finish_reason = rules.finish_reason(row.ids, row.budget)


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


def finished_responses(requests: Sequence[GenerationRequest], rows: Iterable[Row]) -> list[Response]:
    """Those of the rows that are finished, in their order."""
    return [
        Response(requests[row.order].index, array("i", row.ids), row.finish_reason, requests[row.order].sample)
        for row in rows
        if row.finish_reason is not None
    ]


def tell(
    responses: Sequence[Response],
    progress: Callable[[int], None] | None,
    finished: Callable[[Response], None] | None,
) -> None:
    """Call `progress` and `finished` of `Engine.generate` for responses that have just been finished."""
    if finished is not None:
        for response in responses:
            finished(response)
    if responses and progress is not None:
        progress(len(responses))
