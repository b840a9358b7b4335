"""The generator: prompts in, responses out, both as token ids.

Every rank of a model-parallel group runs the same loop over the same requests; data-parallel replicas know nothing of
each other. A response is a function of (seed, iteration, index and sample of its request) and the weights, up to
rounding.

Several responses to one prompt begin together, and the prompt is computed once: its keys and values go to all of them.

Rows are divided into groups, which go through the model one after the other, again and again. Under pipeline
parallelism each is in another stage at a time: a stage works on the next group while the tokens of the last one are on
their way to it. Without, there is one group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from nemo_spin.generation.cache import CacheShape, CachesInUse, caching
from nemo_spin.generation.cache_limit import cache_tokens, rows_that_fit
from nemo_spin.generation.interface import GenerationRequest, Response, Statistics
from nemo_spin.generation.mode import generating
from nemo_spin.generation.row_group import RowGroup, to_device
from nemo_spin.generation.rows import Row, distinct, extend, finished_responses, rows_of, tell
from nemo_spin.generation.rules import Rules
from nemo_spin.generation.sampling import Sampler, SeenTokens
from nemo_spin.generation.schedule import MOST_SLOTS, Schedule, Waiting, groups_wanted
from nemo_spin.generation.stages import Stage
from nemo_spin.generation.vocabulary import VocabularyShard
from nemo_spin.megatron.rotary import RotaryAngles
from nemo_spin.runtime.watchdog import beat


class Generator:
    """This package's own `Engine`: continuous batching over a cache that grows with its rows."""

    def __init__(
        self, model: GPTModel, rules: Rules, slots: int | None = None, kv_cache_gib: float | None = None
    ) -> None:
        """The arguments are those of `Engine`."""
        self.rules, self.statistics = rules, Statistics()
        self._model, self._slots, self._kv_cache_gib = model, slots or MOST_SLOTS, kv_cache_gib
        self._device = next(model.parameters()).device
        self._stage = Stage(model)
        self._sampler = None
        if model.post_process:
            shard = VocabularyShard(model.output_layer.output_size_per_partition, rules.vocab_size)
            self._sampler = Sampler(rules, self._device, shard)

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        iteration: int,
        progress: Callable[[int], None] | None = None,
        finished: Callable[[Response], None] | None = None,
        interrupted: Callable[[], bool] | None = None,
    ) -> list[Response]:
        """See `Engine.generate`. interrupted: asked before each round of the groups."""
        self.statistics = Statistics()
        rows = rows_of(requests, iteration, self.rules)
        if not rows:
            return []
        waiting = Waiting(rows)
        groups = self._groups(rows, waiting)
        # Before `generating`, because megatron-core keeps them for training.
        angles = self._rotary_angles(max(row.longest for row in rows))
        with generating(self._model), caching(self._model) as caches, _all_arrives(groups):
            while waiting or not all(group.idle for group in groups):
                if interrupted is not None and interrupted():
                    break
                for group in groups:
                    beat()
                    ended = self._settle(group)
                    self._advance(group, caches, angles)
                    self._note_cache(groups)
                    tell(finished_responses(requests, ended), progress, finished)
        return finished_responses(requests, rows)

    def _rotary_angles(self, length: int) -> Tensor | None:
        """[length, 1, 1, d], or None without rotary embedding."""
        return self._model.rotary_pos_emb(length) if self._model.position_embedding_type == "rope" else None

    def _groups(self, rows: Sequence[Row], waiting: Waiting) -> list[RowGroup]:
        shape = CacheShape.of(self._model)
        tokens = cache_tokens(shape, self._kv_cache_gib)
        longest = max(row.longest for row in rows)
        count = min(groups_wanted(self._stage.count), len(rows), rows_that_fit(tokens, longest, shape))
        slots = min(self._slots, -(-len(rows) // count))
        return [
            RowGroup(Schedule(waiting, slots, tokens // count), slots, shape, self._seen_tokens(slots))
            for _ in range(count)
        ]

    def _seen_tokens(self, slots: int) -> SeenTokens | None:
        sampler = self._sampler
        if sampler is None or not sampler.needs_seen_tokens:
            return None
        return SeenTokens(slots, sampler.columns, self._device, sampler.start)

    def _advance(self, group: RowGroup, caches: CachesInUse, angles: Tensor | None) -> None:
        """The next pass of a group whose tokens are all known: over the prompts of new rows, if there are any, else a
        token further. Begins to sample, and does not wait for it."""
        caches.current = group.cache
        if admitted := group.schedule.admit():
            self._prefill(group, admitted, angles)
        elif group.schedule.active:
            self._decode(group, angles)

    def _prefill(self, group: RowGroup, rows: Sequence[Row], angles: Tensor | None) -> None:
        """Read the prompts of rows that have just got slots, and what is there of their responses."""
        first = group.place(rows)
        read, places = distinct(rows)
        copies = to_device([places], self._device)[0] if len(read) < len(rows) else None
        lengths = [row.length for row in read]
        longest = max(lengths)
        # No token attends to the padding: any id will do.
        padded = [(*row.prompt_ids, *row.ids, *(0,) * (longest - row.length)) for row in read]
        tokens = to_device(padded, self._device)
        positions = torch.arange(longest, device=self._device).expand_as(tokens)
        group.cache.begin_prefill(first, copies)
        rotary = RotaryAngles.of(angles[:longest]) if angles is not None else None
        last = to_device([lengths], self._device)[0] - 1
        logits = self._stage.forward(tokens, positions, rotary, last)
        if logits is not None and copies is not None:
            logits = logits[copies]
        self.statistics.prefills += 1
        self.statistics.prefill_tokens += tokens.numel()
        self.statistics.prefill_padding += tokens.numel() - sum(lengths)
        self._sample(group, first, rows, logits)

    def _decode(self, group: RowGroup, angles: Tensor | None) -> None:
        """Take the newest token of every row into the cache."""
        rows = group.schedule.active
        group.make_room(held=len(rows))
        tokens, positions = group.last_ids(), group.positions()
        group.cache.begin_decode(positions, group.schedule.longest)
        rotary = RotaryAngles.of(angles[positions, 0][None]) if angles is not None else None
        logits = self._stage.forward(tokens[:, None], positions[:, None], rotary, None)
        self.statistics.decode_steps += 1
        self.statistics.row_steps += len(rows)
        self.statistics.decoded_slots += len(rows)
        self._sample(group, 0, rows, logits)

    def _sample(self, group: RowGroup, first: int, rows: Sequence[Row], logits: Tensor | None) -> None:
        """Begin to sample a token for the rows in the slots from `first` on. logits: None before the last stage."""
        ids = None
        if logits is not None:
            assert self._sampler is not None
            seen = group.seen.mask[first : first + len(rows)] if group.seen is not None else None
            ids = self._sampler(logits, *group.randomness(first, len(rows)), seen)
            if group.seen is not None:
                group.seen.add(first, ids)
        group.first_underway, group.rows_underway = first, list(rows)
        group.underway = self._stage.share(ids, len(rows), self._device)

    def _settle(self, group: RowGroup) -> list[Row]:
        """Wait for the tokens of a group's last pass, and take out the rows that they end; returns these."""
        if group.underway is None:
            return []
        ids, group.underway = group.underway.wait(), None
        group.extend(group.first_underway, ids)
        extend(group.rows_underway, ids.tolist(), self.rules)
        self.statistics.generated_tokens += len(group.rows_underway)
        ended, preempted, moves = group.schedule.leave()
        self.statistics.preempted_rows += len(preempted)
        group.close_gaps(moves)
        return ended

    def _note_cache(self, groups: Sequence[RowGroup]) -> None:
        held = sum(group.cache.nbytes for group in groups)
        self.statistics.peak_cache_bytes = max(self.statistics.peak_cache_bytes, held)


@contextmanager
def _all_arrives(groups: Sequence[RowGroup]) -> Iterator[None]:
    """However it ends inside: afterwards nothing is under way any more, which a later pass could take for its own."""
    try:
        yield
    except BaseException:
        with suppress(RuntimeError):
            _wait_for_all(groups)
        raise
    _wait_for_all(groups)


def _wait_for_all(groups: Sequence[RowGroup]) -> None:
    for group in groups:
        if group.underway is not None:
            group.underway.wait()
