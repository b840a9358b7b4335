"""megatron-core's dynamic inference engine behind `interface.Engine`: the same responses as `engine.Generator` makes.

It decodes rows and reads prompts in one pass, over a paged cache, with flash-attn's kernels. What makes a response what
it is (the noise, the filters, what ends it) is this package's, so a run may change its engine and keep its rollouts, up
to rounding.

On a GPU this has never run: it was written after megatron-core's source, and is tested on a CPU, where
`megatron_engine_cpu` stands in for its kernels. CUDA graphs are off: megatron-core builds them into the layers, which
are the ones that train.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from nemo_spin.generation.cache import CacheShape
from nemo_spin.generation.cache_limit import cache_tokens, rows_that_fit
from nemo_spin.generation.interface import GenerationRequest, Response, Statistics
from nemo_spin.generation.megatron_engine_cpu import cpu_stand_ins
from nemo_spin.generation.megatron_engine_parts import Capacity, add, build_engine, last_stage_rank, release
from nemo_spin.generation.mode import generating
from nemo_spin.generation.rows import Row, extend, finished_responses, rows_of, tell
from nemo_spin.generation.rules import Rules
from nemo_spin.generation.sampling import Sampler, SeenTokens
from nemo_spin.generation.schedule import MOST_SLOTS
from nemo_spin.runtime.watchdog import beat

if TYPE_CHECKING:
    from megatron.core.inference.engines.dynamic_engine import DynamicInferenceEngine

# Tokens of a pass at most, unless a single prompt is longer: bounds its activations.
PASS_TOKENS = 16384
# flash-attn reads pages of a multiple of 256 tokens. On a CPU small ones waste less, and the tests see more of them.
GPU_PAGE, CPU_PAGE = 256, 16


class MegatronEngine:
    """megatron-core's engine as an `Engine`. A prompt to which there are several responses is read for each of them."""

    def __init__(
        self, model: GPTModel, rules: Rules, slots: int | None = None, kv_cache_gib: float | None = None
    ) -> None:
        """The arguments are those of `Engine`."""
        self.rules, self.statistics = rules, Statistics()
        self._model, self._slots, self._kv_cache_gib = model, slots or MOST_SLOTS, kv_cache_gib
        self._device = next(model.parameters()).device
        self._sampler = Sampler(rules, self._device)

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        iteration: int,
        progress: Callable[[int], None] | None = None,
        finished: Callable[[Response], None] | None = None,
        interrupted: Callable[[], bool] | None = None,
    ) -> list[Response]:
        """See `interface.Engine.generate`."""
        self.statistics = Statistics()
        rows = rows_of(requests, iteration, self.rules)
        if not rows:
            return []
        with self._engine_for(rows) as engine:
            while engine.has_unfinished_requests() and not (interrupted is not None and interrupted()):
                beat()
                self._ended: list[Row] = []
                engine.step_modern()
                tell(finished_responses(requests, self._ended), progress, finished)
        return finished_responses(requests, rows)

    @contextmanager
    def _engine_for(self, rows: Sequence[Row]) -> Iterator[DynamicInferenceEngine]:
        """megatron-core's engine with all rows queued. Afterwards the model is what it was, and the cache free."""
        capacity = self._capacity(rows)
        self._rows, self._seen = rows, None
        self._free_slots, self._slot_of = list(range(capacity.rows)), {}
        if self._sampler.needs_seen_tokens and dist.get_rank() == last_stage_rank():
            self._seen = SeenTokens(capacity.rows, self._sampler.columns, self._device)
        with _fixed_angles(self._model, capacity.length), generating(self._model), cpu_stand_ins(self._model):
            self._engine = engine = build_engine(self._model, capacity, self._sample, self._which_ended)
            try:
                self.statistics.peak_cache_bytes = engine.context.memory_buffer.nbytes
                for number, row in enumerate(rows):
                    add(engine, number, row.prompt_ids, row.budget)
                yield engine
            finally:
                self.statistics.preempted_rows = engine.evicted_request_count
                self._rows, self._seen, self._engine = [], None, None
                release(engine)

    def _capacity(self, rows: Sequence[Row]) -> Capacity:
        # megatron-core shares requests of a pass out over the tensor-parallel ranks.
        tp_size = parallel_state.get_tensor_model_parallel_world_size()
        slots = -(-min(self._slots, len(rows)) // tp_size) * tp_size
        page = GPU_PAGE if self._device.type == "cuda" else CPU_PAGE
        length = max(row.longest for row in rows)
        pages_of_longest = -(-length // page)
        shape = CacheShape.of(self._model)
        tokens = cache_tokens(shape, self._kv_cache_gib)
        rows_that_fit(tokens, pages_of_longest * page, shape)  # refuses one that never does
        return Capacity(
            rows=slots,
            length=length,
            tokens=max(PASS_TOKENS, slots, length),
            page=page,
            pages=min(slots * pages_of_longest, tokens // page),
        )

    def _sample(self, numbers: list[int], logits: Tensor | None) -> Tensor:
        """Give each of these rows its next token. logits: [b, padded vocabulary] on the last stage, elsewhere None.

        Returns the tokens, [b] int64, on every rank.
        """
        rows = [self._rows[number] for number in numbers]
        self._count(len(rows))
        ids = torch.empty(len(rows), dtype=torch.int64, device=self._device)
        if dist.get_rank() == last_stage_rank():
            host = [[row.key for row in rows], [len(row.ids) for row in rows]]
            keys, lengths = torch.tensor(host, device=self._device)
            places = None if self._seen is None else torch.tensor(self._slots_of(rows), device=self._device)
            ids = self._sampler(logits, keys, lengths, None if places is None else self._seen.mask[places])
            if places is not None:
                self._seen.mask[places, ids.clamp(min=0)] = True
        group = parallel_state.get_model_parallel_group()
        if group.size() > 1:
            dist.broadcast(ids, last_stage_rank(), group=group)
        extend(rows, ids.tolist(), self.rules)
        for row in rows:
            if row.finish_reason is not None:
                self._ended.append(row)
                if row.order in self._slot_of:
                    self._free_slots.append(self._slot_of[row.order])
        self.statistics.generated_tokens += len(rows)
        return ids

    def _which_ended(self, numbers: Sequence[int]) -> set[int]:
        return {number for number in numbers if self._rows[number].finish_reason is not None}

    def _slots_of(self, rows: Sequence[Row]) -> list[int]:
        """Where the seen tokens of each row are marked; a new row gets a place of its own.

        One that megatron-core sends back for a while keeps its place: it is let in again before any new one.
        """
        for row in rows:
            if row.order not in self._slot_of:
                slot = self._slot_of[row.order] = self._free_slots.pop()
                self._seen.admit(slot, [row.prompt_ids])
        return [self._slot_of[row.order] for row in rows]

    def _count(self, rows: int) -> None:
        """Note what the pass cost that has made these logits: some rows were decoded, the others' prompts were read."""
        context, statistics = self._engine.context, self.statistics
        prompts = context.num_prefill_requests
        decoded = rows - prompts
        padding = context.padded_active_token_count - context.active_token_count
        if decoded:
            statistics.decode_steps += 1
            statistics.row_steps += decoded
            statistics.decoded_slots += decoded + (0 if prompts else padding)
        if prompts:
            statistics.prefills += 1
            statistics.prefill_tokens += context.padded_active_token_count - decoded
            statistics.prefill_padding += padding


@contextmanager
def _fixed_angles(model: GPTModel, length: int) -> Iterator[None]:
    """Inside, the model's rotary embedding answers with angles that were made before.

    It remembers what it was asked for, and training could not use what was made without gradients.
    """
    if model.position_embedding_type != "rope":
        yield
        return
    embedding = model.rotary_pos_emb
    angles = embedding(length)
    embedding.forward = lambda longest, *args, **kwargs: angles[:longest]
    try:
        yield
    finally:
        del embedding.forward
