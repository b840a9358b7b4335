"""The generator: prompts in, responses out, both as token ids.

Every rank of a model-parallel group runs the same loop over the same requests; data-parallel replicas know nothing of
each other. A response is a function of (seed, iteration, index and sample of its request) and the weights, up to
rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from nemo_spin.errors import DataError, UserError
from nemo_spin.generation.cache import KVCache, kv_cache
from nemo_spin.generation.interface import GenerationRequest, Response, Statistics
from nemo_spin.generation.mode import generating
from nemo_spin.generation.noise import sample_key
from nemo_spin.generation.rotary import RotaryAngles
from nemo_spin.generation.sampling import NO_TOKEN, Sampler, SeenTokens
from nemo_spin.generation.schedule import Row, Schedule
from nemo_spin.generation.stages import Stage
from nemo_spin.watchdog import beat

if TYPE_CHECKING:
    from nemo_spin.config import SamplingParams


class Generator:
    """Generates responses with the weights that the model has when `generate` is called.

    model: this rank's chunk of the model; there is only one (no virtual pipeline).
    vocab_size: ids from here on are padding of the embedding and never sampled.
    max_sequence_length: tokens of prompt and response together, at most.
    min_length: tokens of a response before which nothing ends it but its budget.
    stop_ids: a response ends with the first of these, which belongs to it.
    slots: rows decoded at a time. pad_id: any valid id; fills prompts of unequal length.
    should_stop: asked after each token, with the ids generated so far, whether the response ends here; has to answer
        alike on every rank.
    """

    def __init__(
        self,
        model: GPTModel,
        vocab_size: int,
        max_sequence_length: int,
        sampling: SamplingParams,
        min_length: int,
        stop_ids: frozenset[int],
        seed: int,
        slots: int,
        pad_id: int,
        should_stop: Callable[[Sequence[int]], bool] | None = None,
    ) -> None:
        self.statistics = Statistics()
        self._model, self._max_sequence_length, self._seed = model, max_sequence_length, seed
        self.stop_ids, self._min_length, self._should_stop = stop_ids, min_length, should_stop
        self._slots, self._pad_id = slots, pad_id
        parameter = next(model.parameters())
        self._device, self._dtype = parameter.device, parameter.dtype
        self._stage = Stage(model)
        self._sampler = Sampler(sampling, vocab_size, min_length, stop_ids, self._device)
        self._sampling = sampling

    @property
    def settings(self) -> dict[str, Any]:
        """What a response depends on beside its request and the weights, as JSON has it."""
        return {
            "seed": self._seed,
            "vocab_size": self._sampler.vocab_size,
            "max_sequence_length": self._max_sequence_length,
            "min_length": self._min_length,
            "stop_ids": sorted(self.stop_ids),
            **asdict(self._sampling),
        }

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        iteration: int,
        progress: Callable[[int], None] | None = None,
        finished: Callable[[Response], None] | None = None,
        interrupted: Callable[[], bool] | None = None,
    ) -> list[Response]:
        """Responses in the order of the requests.

        progress: told how many more are finished. finished: given each response as soon as it is, on every rank.
        interrupted: asked after every step whether to end at once, and has to answer alike on every rank of the
            model-parallel group; if so, only the responses that are finished are returned.

        Raises DataError if a prompt leaves no room for a response, UserError if the model's logits are not finite.
        The model is then, as after success, in the state in which it was.
        """
        self.statistics = Statistics()
        rows = [self._row(order, request, iteration) for order, request in enumerate(requests)]
        if not rows:
            return []
        slots = min(self._slots, len(rows))
        schedule = Schedule(rows, slots)
        capacity = max(len(row.prompt_ids) + row.budget for row in rows)
        seen = None
        if self._stage.samples and self._sampler.needs_seen_tokens:
            seen = SeenTokens(slots, self._sampler.vocab_size, self._device)
        # Before `generating`, because megatron-core keeps them for training.
        angles = self._rotary_angles(capacity)
        with generating(self._model), kv_cache(self._model, slots, capacity) as cache:
            while not schedule.done and not (interrupted is not None and interrupted()):
                beat()
                admitted = schedule.admit()
                if admitted:
                    self._prefill(admitted, len(schedule.active) - len(admitted), cache, angles, seen)
                else:
                    self._decode(schedule.active, cache, angles, seen)
                ended = self._retire(schedule, cache, seen)
                if finished is not None:
                    for row in ended:
                        finished(_response(requests[row.order], row))
                if ended and progress is not None:
                    progress(len(ended))
        return [
            _response(request, row)
            for request, row in zip(requests, rows, strict=True)
            if row.finish_reason is not None
        ]

    def _row(self, order: int, request: GenerationRequest, iteration: int) -> Row:
        budget = min(request.max_new_tokens, self._max_sequence_length - len(request.prompt_ids))
        if budget < 1 or not request.prompt_ids:
            raise DataError(
                f"Sample {request.index} cannot be answered: its prompt has {len(request.prompt_ids)} tokens, at most "
                f"{request.max_new_tokens} new ones are asked for, and a sequence holds {self._max_sequence_length}."
            )
        key = sample_key(self._seed, iteration, request.index, request.sample)
        return Row(order, request.prompt_ids, key, budget)

    def _rotary_angles(self, length: int) -> Tensor | None:
        """[length, 1, 1, d], or None without rotary embedding."""
        return self._model.rotary_pos_emb(length) if self._model.position_embedding_type == "rope" else None

    def _prefill(
        self, rows: Sequence[Row], first: int, cache: KVCache, angles: Tensor | None, seen: SeenTokens | None
    ) -> None:
        """Read the prompts of rows that got the slots from `first` on, and sample the first token of each."""
        lengths = [len(row.prompt_ids) for row in rows]
        longest = max(lengths)
        padded = [row.prompt_ids + (self._pad_id,) * (longest - len(row.prompt_ids)) for row in rows]
        tokens = torch.tensor(padded, device=self._device)
        positions = torch.arange(longest, device=self._device).expand_as(tokens)
        last = torch.tensor(lengths, device=self._device) - 1
        cache.begin_prefill(first)
        if seen is not None:
            seen.admit(first, [row.prompt_ids for row in rows])
        rotary = RotaryAngles.of(angles[:longest]) if angles is not None else None
        logits = self._stage.forward(tokens, positions, rotary, last)
        self.statistics.prefills += 1
        self.statistics.prefill_tokens += tokens.numel()
        self.statistics.prefill_padding += tokens.numel() - sum(lengths)
        self._extend(rows, first, logits, seen)

    def _decode(self, rows: Sequence[Row], cache: KVCache, angles: Tensor | None, seen: SeenTokens | None) -> None:
        """Sample one more token of every row, all of which are in the slots from 0 on."""
        host = [[row.ids[-1] for row in rows], [row.length - 1 for row in rows]]
        tokens, positions = torch.tensor(host, device=self._device)
        cache.begin_decode(positions, max(row.length for row in rows), self._dtype)
        rotary = RotaryAngles.of(angles[positions, 0][None]) if angles is not None else None
        logits = self._stage.forward(tokens[:, None], positions[:, None], rotary, None)
        self.statistics.decode_steps += 1
        self.statistics.row_steps += len(rows)
        self.statistics.decoded_slots += len(rows)
        self._extend(rows, 0, logits, seen)

    def _extend(self, rows: Sequence[Row], first: int, logits: Tensor | None, seen: SeenTokens | None) -> None:
        """Sample a token for each of the rows in the slots from `first` on, and see which of them it ends."""
        ids = None
        if logits is not None:
            host = [[row.key for row in rows], [len(row.ids) for row in rows]]
            keys, lengths = torch.tensor(host, device=self._device)
            mask = seen.mask[first : first + len(rows)] if seen is not None else None
            ids = self._sampler(logits, keys, lengths, mask)
            if seen is not None:
                seen.add(first, ids.clamp(min=0))
        for row, token in zip(rows, self._stage.agree(ids, len(rows), self._device), strict=True):
            if token == NO_TOKEN:
                raise UserError(
                    "The model's logits are not finite, or no token is left to choose from: check its weights, the "
                    "learning rate, and the sampling parameters."
                )
            row.ids.append(token)
            row.finish_reason = self._finish_reason(row)
        self.statistics.generated_tokens += len(rows)

    def _finish_reason(self, row: Row) -> str | None:
        if row.ids[-1] in self.stop_ids:
            return "stop"
        if self._should_stop is not None and len(row.ids) >= self._min_length and self._should_stop(row.ids):
            return "stop"
        return "length" if len(row.ids) == row.budget else None

    def _retire(self, schedule: Schedule, cache: KVCache, seen: SeenTokens | None) -> list[Row]:
        """Take finished rows out of their slots and close the gaps; returns them."""
        finished, moves = schedule.retire()
        if moves:
            sources, destinations = torch.tensor(moves, device=self._device).T
            length = max(schedule.active[destination].length for _, destination in moves)
            cache.move(sources, destinations, length)
            if seen is not None:
                seen.move(sources, destinations)
        return finished


def _response(request: GenerationRequest, row: Row) -> Response:
    assert row.finish_reason is not None
    return Response(request.index, tuple(row.ids), row.finish_reason)
