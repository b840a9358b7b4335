"""The key/value cache, and the attention over it that stands in for each layer's own while a model generates.

megatron-core's inference contexts would keep a cache too; but they want prompts padded on the left, TransformerEngine's
decode path ignores the mask that this takes, and their interface differs between releases. Replacing only the core
attention leaves projections, norms and rotary embedding to the layer, whatever it was built from.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

# Lengths are rounded up to this: fewer shapes, and the alignment that fused attention kernels ask of a mask.
GRANULE = 16


def round_up(length: int) -> int:
    return -(-length // GRANULE) * GRANULE


@dataclass(frozen=True)
class CacheShape:
    """What this rank keeps of a token: keys and values of so many heads (query groups) in each of its layers."""

    layers: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, model: GPTModel) -> CacheShape:
        config, parameter = model.config, next(model.parameters())
        heads = config.num_query_groups // parallel_state.get_tensor_model_parallel_world_size()
        return cls(len(model.decoder.layers), heads, config.kv_channels, parameter.dtype, parameter.device)

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.layers * self.heads * self.head_dim * self.dtype.itemsize


class KVCache:
    """Keys and values of a group of rows in all layers of this rank; its rows are the first ones, without gaps.

    keys, values: of each layer [rows, heads, capacity, head_dim]. It grows as it is asked to.
    """

    def __init__(self, shape: CacheShape) -> None:
        self.shape, self.rows, self.capacity = shape, 0, 0
        empty = torch.empty(0, shape.heads, 0, shape.head_dim, dtype=shape.dtype, device=shape.device)
        self.keys, self.values = [empty] * shape.layers, [empty] * shape.layers
        self.prefilling, self.first = True, 0
        self._copies: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.rows * self.capacity * self.shape.bytes_per_token

    def resize(self, rows: int, capacity: int, held: int) -> None:
        """Room for so many rows of so many tokens; the first `held` rows keep what they hold, as far as it fits."""
        length = min(self.capacity, capacity)
        for kept in (self.keys, self.values):
            for layer, old in enumerate(kept):
                # Zeros, because what was never written is multiplied by a probability of zero.
                new = old.new_zeros(rows, self.shape.heads, capacity, self.shape.head_dim)
                new[:held, :, :length] = old[:held, :, :length]
                kept[layer] = new
                del old  # before the next layer's is made: only one layer is there twice
        self.rows, self.capacity = rows, capacity

    def begin_prefill(self, first: int, copies: Tensor | None = None) -> None:
        """The next forward pass gives whole prompts, padded on the right, to rows first, first + 1, ...

        copies: [rows] int64, for each of these rows the prompt of the pass that it gets; None for one each.
        """
        self.prefilling, self.first, self._copies = True, first, copies

    def prefill(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Keep what a layer has made of the prompts. key and value: [s, b, heads, head_dim]."""
        for kept, made in ((self.keys[layer], key), (self.values[layer], value)):
            prompts = made.permute(1, 2, 0, 3)
            if self._copies is not None:
                prompts = prompts[self._copies]
            kept[self.first : self.first + len(prompts), :, : len(made)] = prompts

    def begin_decode(self, positions: Tensor, longest: int) -> None:
        """The next forward pass gives one token to each of the first b rows.

        positions: [b] int64, where in its row each token goes. longest: tokens in the fullest row, this one included.
        """
        self.prefilling = False
        self.length = round_up(longest)
        device = positions.device
        beyond = torch.arange(self.length, device=device) > positions[:, None]
        mask = torch.zeros(beyond.shape, dtype=self.shape.dtype, device=device).masked_fill_(beyond, float("-inf"))
        self.mask = mask[:, None, None, :]
        heads = torch.arange(len(positions) * self.shape.heads, device=device) * self.capacity
        self.places = heads + positions.repeat_interleave(self.shape.heads)

    def move(self, sources: Tensor, destinations: Tensor, length: int) -> None:
        """Copy the first `length` tokens of some rows to others."""
        for kept in (*self.keys, *self.values):
            kept[destinations, :, :length] = kept[sources, :, :length]


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, softmax_scale: float | None) -> Tensor:
    """Attention of a few queries. query [b, g, n, d], keys and values [b, g, l, d], mask [b, 1, 1, l] additive.

    softmax_scale: None for 1 / sqrt(d). Returns [b, g, n, d].
    """
    if query.dtype is not torch.float32:
        # In 16 bits the fused kernel is the one that keeps scores and sums in 32.
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=softmax_scale)
    # In 32 bits it would give the same, up to four times slower on a CPU for so few queries.
    scale = query.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    scores = (query * scale @ keys.transpose(2, 3)).add_(mask)
    return scores.softmax(dim=-1) @ values


class CachedAttention(torch.nn.Module):
    """Causal attention that remembers: a stand-in for a layer's core attention.

    A prefill is computed by the layer's own core attention, as in training; its keys and values are kept. A decode
    step attends with one query per row to what is kept of that row.
    """

    def __init__(
        self, caches: CachesInUse, layer: int, core_attention: torch.nn.Module, softmax_scale: float | None
    ) -> None:
        super().__init__()
        self.caches, self.layer = caches, layer
        self.core_attention, self.softmax_scale = core_attention, softmax_scale

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Tensor:
        """query [s, b, heads, d], key and value [s, b, groups, d] of this tensor-parallel rank -> [s, b, heads * d]."""
        cache = self.caches.current
        keys, values = cache.keys[self.layer], cache.values[self.layer]
        _, batch, groups, head_dim = key.shape
        if cache.prefilling:
            cache.prefill(self.layer, key, value)
            return self.core_attention(query, key, value, attention_mask, **kwargs)
        keys.view(-1, head_dim).index_copy_(0, cache.places, key.reshape(-1, head_dim))
        values.view(-1, head_dim).index_copy_(0, cache.places, value.reshape(-1, head_dim))
        # The query heads that share a group stand side by side: as if they were several tokens of one head, so that
        # the keys need not be repeated.
        heads = query.shape[2]
        query = query.view(batch, groups, -1, head_dim)
        keys, values = keys[:batch, :, : cache.length], values[:batch, :, : cache.length]
        out = attend(query, keys, values, cache.mask, self.softmax_scale)
        return out.reshape(1, batch, heads * head_dim)


class CachesInUse:
    """current: the cache of the rows that the next forward pass is for."""

    current: KVCache


@contextmanager
def caching(model: GPTModel) -> Iterator[CachesInUse]:
    """Inside, the model's attention reads and writes a cache; afterwards, also after an error, it is what it was."""
    caches, scale = CachesInUse(), model.config.softmax_scale
    attentions = [layer.self_attention for layer in model.decoder.layers]
    originals = [attention.core_attention for attention in attentions]
    try:
        for i, (attention, original) in enumerate(zip(attentions, originals, strict=True)):
            attention.core_attention = CachedAttention(caches, i, original, scale)
        yield caches
    finally:
        for attention, original in zip(attentions, originals, strict=True):
            attention.core_attention = original
