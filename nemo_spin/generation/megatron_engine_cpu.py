"""What megatron-core's dynamic engine needs where there is no CUDA, so that its tests run everywhere.

It attends with flash-attn over pages of its cache, appends to them with Triton, pins host memory and marks its steps
for NVIDIA's profiler. Here are stand-ins for these. All else, most of all which tokens are where in which page, is
megatron-core's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.inference.contexts import dynamic_context
from megatron.core.inference.engines import dynamic_engine
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer import attention
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nemo_spin.generation.cache import attend


class Unpinned(TorchFunctionMode):
    """Inside, memory is never pinned. Only for setting up: it makes every operation slower."""

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is Tensor.pin_memory:
            return args[0]
        return func(*args, **{name: value for name, value in (kwargs or {}).items() if name != "pin_memory"})


def _decode(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, pages: Tensor, scale: float | None) -> Tensor:
    """One query per row. query [b, heads, d], keys and values [pages, page, groups, d], lengths [b], pages [b, p]."""
    batch, heads, head_dim = query.shape
    page, groups = keys.shape[1:3]
    longest = max(int(lengths.max()), 1)
    # A row that only fills up a batch has no pages: it reads some page, and its result is not used.
    used = pages[:, : -(-longest // page)].clamp(min=0).long()
    keys, values = (t[used].flatten(1, 2)[:, :longest].transpose(1, 2) for t in (keys, values))
    beyond = torch.arange(longest) >= lengths.clamp(min=1)[:, None]
    mask = torch.zeros(batch, longest, dtype=query.dtype).masked_fill_(beyond, float("-inf"))
    return attend(query.view(batch, groups, -1, head_dim), keys, values, mask[:, None, None], scale).reshape(
        batch, heads, head_dim
    )


def _prefill(query: Tensor, keys: Tensor, values: Tensor, length: int, pages: Tensor, scale: float | None) -> Tensor:
    """The last queries of one row. query [q, heads, d]; the row has `length` tokens in `pages` [p]."""
    used = pages[: -(-length // keys.shape[1])].long()
    keys, values = (t[used].flatten(0, 1)[:length].transpose(0, 1) for t in (keys, values))
    seen = torch.ones(len(query), length, dtype=torch.bool).tril(length - len(query))
    grouped = keys.shape[0] != query.shape[1]
    out = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None], keys[None], values[None], attn_mask=seen, scale=scale, enable_gqa=grouped
    )
    return out[0].transpose(0, 1)


def paged_attention(scale: float | None) -> Callable[..., Tensor]:
    """A stand-in for `Attention.flash_decode_and_prefill`. scale: of the softmax, None for 1 / sqrt(head_dim)."""

    def attention_over_pages(
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        longest_query: int,
        longest: int,
        query_ends: Tensor,
        key_ends: Tensor,
        lengths: Tensor,
        pages: Tensor,
        is_decode_only: bool,
        **_: Any,
    ) -> Tensor:
        """query [tokens, 1, heads, d] of all rows one after the other, query_ends [b + 1] -> the same shape."""
        flat = query.reshape(-1, *query.shape[-2:])
        if is_decode_only:
            return _decode(flat, keys, values, lengths, pages, scale).view(query.shape)
        out = torch.zeros_like(flat)
        starts, counts = query_ends[:-1].long(), query_ends.diff()
        single = (counts == 1).nonzero()[:, 0]
        if len(single):
            places = starts[single]
            out[places] = _decode(flat[places], keys, values, lengths[single], pages[single], scale)
        for row in (counts > 1).nonzero()[:, 0].tolist():
            queries = slice(int(starts[row]), int(starts[row] + counts[row]))
            out[queries] = _prefill(flat[queries], keys, values, int(lengths[row]), pages[row], scale)
        return out.view(query.shape)

    return attention_over_pages


def _ignore(*args: Any) -> None: ...


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    own = vars(owner).get(name, _ignore)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own is _ignore:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


@contextmanager
def cpu_stand_ins(model: GPTModel) -> Iterator[None]:
    """Inside, megatron-core's dynamic engine runs this model on a CPU. Does nothing with CUDA."""
    if torch.cuda.is_available():
        yield
        return
    with ExitStack() as stack:
        stack.enter_context(_replaced(attention, "HAVE_FA3", True))
        stack.enter_context(_replaced(dynamic_context, "triton_append_key_value_cache", None))
        for name in ("range_push", "range_pop"):
            if hasattr(dynamic_engine, name):
                stack.enter_context(_replaced(dynamic_engine, name, _ignore))
        kernel = paged_attention(model.config.softmax_scale)
        for layer in model.decoder.layers:
            stack.enter_context(_replaced(layer.self_attention, "flash_decode_and_prefill", kernel))
        yield
