"""megatron-core's dynamic engine for a model: the only place that knows how its releases differ.

The engine keeps keys and values in pages, reads prompts and decodes rows in the same pass, and lets waiting requests in
when there is room. What it would sample is replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext
from megatron.core.inference.engines.dynamic_engine import DynamicInferenceEngine
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer import attention
from megatron.core.utils import is_fa_min_version
from torch import Tensor

from nemo_spin.generation.cache import CacheShape
from nemo_spin.generation.megatron_engine_cpu import Unpinned

try:
    from megatron.core.inference.config import InferenceConfig
except ImportError:  # in 0.16 the context and the wrapper take their settings one by one
    InferenceConfig = None

# The oldest whose kernels read pages as megatron-core has them.
_FLASH_ATTENTION = "2.7.3"


@dataclass(frozen=True)
class Capacity:
    """rows: in the engine at a time. length: tokens of the longest row. tokens: of a pass, at most.

    page: tokens of a page of the cache. pages: that it has, enough for the longest row.
    """

    rows: int
    length: int
    tokens: int
    page: int
    pages: int


class _NoText:
    """The tokenizer that the engine asks for the text of what is finished; nobody reads it."""

    def detokenize(self, *args: Any, **kwargs: Any) -> str:
        return ""


class _Controller(TextGenerationController):
    """Samples with a function of ours; logits stay on the last pipeline stage.

    sample: given the ids of the requests in the pass and, on the last stage, their logits [b, vocabulary], elsewhere
        None; returns their next tokens [b] int64, on every rank the same.
    """

    sample: Callable[[list[int], Tensor | None], Tensor]

    def _dynamic_step_forward_logits(self, input_ids: Tensor, position_ids: Tensor) -> Tensor | None:
        with torch.inference_mode():
            logits = self.inference_wrapped_model.run_one_forward_step(
                {"tokens": input_ids, "position_ids": position_ids, "attention_mask": None}
            )
        self._all_logits_cuda = logits  # where 0.19 looks for them
        return logits

    def _dynamic_step_sample_bookkeeping(self) -> None:
        """Nothing to prepare (0.16 only)."""

    def _dynamic_step_sample_logits(self, logits: Tensor | None = None) -> None:
        logits = self._all_logits_cuda
        context = self.inference_wrapped_model.inference_context
        request_ids = context.request_ids[context.paused_request_count : context.total_request_count].tolist()
        count = len(request_ids)
        self._sampled_tokens_cuda[:count] = self.sample(request_ids, None if logits is None else logits[0, :count])


def obstacle(softmax_scale: float | None, precision: str) -> str | None:
    """Why the engine cannot run here, or would not compute what such a model computes; None if it can."""
    if not torch.cuda.is_available():
        return None  # the stand-ins take whatever there is
    if precision != "bf16":
        return f"flash-attn computes in 16 bits, and trainer.precision is {precision}"
    if softmax_scale is not None:
        # 0.16's decode step leaves it to flash-attn, which takes 1 / sqrt(head_dim).
        return f"it ignores the checkpoint's softmax_scale {softmax_scale:g}"
    if not _have_flash_attention():
        return f"it needs flash-attn {_FLASH_ATTENTION} or newer, or flash-attn 3"
    return None


def _have_flash_attention() -> bool:
    if attention.HAVE_FA3 or getattr(attention, "HAVE_FA4", False):
        return True
    try:
        return bool(is_fa_min_version(_FLASH_ATTENTION))
    except ImportError:
        return False


def build_engine(
    model: GPTModel,
    capacity: Capacity,
    sample: Callable[[list[int], Tensor | None], Tensor],
    ended: Callable[[Sequence[int]], set[int]],
) -> DynamicInferenceEngine:
    """An engine without requests. sample: see `_Controller`. ended: which of these requests end with their last token.

    The pages are allocated at once. Where they do not suffice for all rows, megatron-core sends some back to those that
    wait, to be read again later.
    """
    page_bytes = capacity.page * CacheShape.of(model).bytes_per_token
    # In GiB, as megatron-core takes it. One page more for what fills up a pass, and half a one because it rounds down.
    size = (capacity.pages + 1.5) * page_bytes / 2**30
    common = {
        "max_sequence_length": capacity.length,
        "buffer_size_gb": size,
        "block_size_tokens": capacity.page,
        "max_requests": capacity.rows,
        "max_tokens": capacity.tokens,
    }
    build = _build_0_16 if InferenceConfig is None else _build
    if torch.cuda.is_available():
        engine = build(model, common)
    else:
        with Unpinned():
            engine = build(model, common)
        # The stand-in for flash-attn multiplies what was never written by a probability of zero.
        engine.context.memory_buffer.zero_()
    engine.controller.sample = sample
    engine.controller.set_stop_word_finished_ids_callback(ended)
    return engine


def _build_0_16(model: GPTModel, common: dict[str, Any]) -> DynamicInferenceEngine:
    from megatron.core.inference.model_inference_wrappers.inference_wrapper_config import InferenceWrapperConfig

    config = model.config
    context = DynamicInferenceContext(
        params_dtype=config.params_dtype,
        num_layers=len(model.decoder.layers),
        kv_channels=config.kv_channels,
        num_attention_heads=config.num_query_groups or config.num_attention_heads,
        **common,
    )
    wrapper_config = InferenceWrapperConfig(
        hidden_size=config.hidden_size,
        params_dtype=config.params_dtype,
        inference_batch_times_seqlen_threshold=-1,
        padded_vocab_size=model.vocab_size,
    )
    controller = _Controller(GPTInferenceWrapper(model, wrapper_config, context), _NoText())
    return DynamicInferenceEngine(controller, context, random_seed=0, enable_chunked_prefill=False)


def _build(model: GPTModel, common: dict[str, Any]) -> DynamicInferenceEngine:
    context = DynamicInferenceContext(model.config, InferenceConfig(**common))
    return DynamicInferenceEngine(_Controller(GPTInferenceWrapper(model, context), _NoText()), context)


def add(engine: DynamicInferenceEngine, request_id: int, prompt_ids: Sequence[int], budget: int) -> None:
    """Queue a request. budget: of new tokens."""
    params = SamplingParams(num_tokens_to_generate=budget, termination_id=-1)
    engine.add_request(request_id, list(prompt_ids), params)


def release(engine: DynamicInferenceEngine) -> None:
    """Free the pages, whoever still holds the engine, and tell megatron-core's modules that training goes on."""
    engine.context.memory_buffer = None
    if InferenceConfig is not None:
        from megatron.core.inference.utils import InferenceMode

        InferenceMode.unset_active()


def last_stage_rank() -> int:
    """The global rank that samples for the model-parallel group: the first of its last stage."""
    group = torch.distributed.get_process_group_ranks(parallel_state.get_model_parallel_group())
    return group[-parallel_state.get_tensor_model_parallel_world_size()]
