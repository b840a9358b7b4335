"""The key/value cache, and the attention over it that stands in for each layer's own while a model generates.

megatron-core's inference contexts would keep a cache too; but they want prompts padded on the left, TransformerEngine's
decode path ignores the mask that this takes, and their interface differs between releases. Replacing only the core
attention leaves projections, norms and rotary embedding to the layer, whatever it was built from.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

# Lengths are rounded up to this: fewer shapes, and the alignment that fused attention kernels ask of a mask.
GRANULE = 16


def round_up(length: int) -> int:
    return -(-length // GRANULE) * GRANULE


class KVCache:
    """Keys and values of all layers of this rank, one slot per row; rows in use are the first slots, without gaps.

    slots: rows at most. capacity: tokens per slot.
    """

    def __init__(self, model: GPTModel, slots: int, capacity: int) -> None:
        self.slots, self.capacity = slots, round_up(capacity)
        scale = model.config.softmax_scale
        self.layers = [
            CachedAttention(self, layer.self_attention.core_attention, scale) for layer in model.decoder.layers
        ]
        self.prefilling = True
        self.first = 0

    def begin_prefill(self, first: int) -> None:
        """The next forward pass gives whole prompts, padded on the right, to slots first, first + 1, ..."""
        self.prefilling, self.first = True, first

    def begin_decode(self, positions: Tensor, longest: int, dtype: torch.dtype) -> None:
        """The next forward pass gives one token to each of the first b slots.

        positions: [b] int64, where in its slot each token goes. longest: tokens in the fullest slot, this one included.
        """
        self.prefilling = False
        self.length = min(round_up(longest), self.capacity)
        device = positions.device
        beyond = torch.arange(self.length, device=device) > positions[:, None]
        mask = torch.zeros(beyond.shape, dtype=dtype, device=device).masked_fill_(beyond, float("-inf"))
        self.mask = mask[:, None, None, :]
        groups = self.layers[0].keys.shape[1]
        heads = torch.arange(len(positions) * groups, device=device) * self.capacity
        self.places = heads + positions.repeat_interleave(groups)

    def move(self, sources: Tensor, destinations: Tensor, length: int) -> None:
        """Copy the first `length` tokens of some slots to others."""
        for layer in self.layers:
            for stored in (layer.keys, layer.values):
                stored[destinations, :, :length] = stored[sources, :, :length]


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

    def __init__(self, cache: KVCache, core_attention: torch.nn.Module, softmax_scale: float | None) -> None:
        super().__init__()
        self.cache, self.core_attention, self.softmax_scale = cache, core_attention, softmax_scale
        self.keys = self.values = torch.empty(0)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Tensor:
        """query [s, b, heads, d], key and value [s, b, groups, d] of this tensor-parallel rank -> [s, b, heads * d]."""
        cache = self.cache
        if cache.prefilling:
            self._keep(key, value)
            return self.core_attention(query, key, value, attention_mask, **kwargs)
        batch, heads, head_dim = query.shape[1:]
        self.keys.view(-1, head_dim).index_copy_(0, cache.places, key.reshape(-1, head_dim))
        self.values.view(-1, head_dim).index_copy_(0, cache.places, value.reshape(-1, head_dim))
        # The query heads that share a group stand side by side: as if they were several tokens of one head, so that
        # the keys need not be repeated.
        query = query.view(batch, key.shape[2], -1, head_dim)
        keys, values = self.keys[:batch, :, : cache.length], self.values[:batch, :, : cache.length]
        out = attend(query, keys, values, cache.mask, self.softmax_scale)
        return out.reshape(1, batch, heads * head_dim)

    def _keep(self, key: Tensor, value: Tensor) -> None:
        length, batch, groups, head_dim = key.shape
        if not self.keys.numel():
            # Zeros, because what was never written is multiplied by a probability of zero.
            shape = (self.cache.slots, groups, self.cache.capacity, head_dim)
            self.keys, self.values = key.new_zeros(shape), value.new_zeros(shape)
        slots = slice(self.cache.first, self.cache.first + batch)
        self.keys[slots, :, :length] = key.permute(1, 2, 0, 3)
        self.values[slots, :, :length] = value.permute(1, 2, 0, 3)


@contextmanager
def kv_cache(model: GPTModel, slots: int, capacity: int) -> Iterator[KVCache]:
    """Inside, the model's attention reads and writes the cache; afterwards, also after an error, it is what it was."""
    cache = KVCache(model, slots, capacity)
    try:
        for layer, cached in zip(model.decoder.layers, cache.layers, strict=True):
            layer.self_attention.core_attention = cached
        yield cache
    finally:
        for layer, cached in zip(model.decoder.layers, cache.layers, strict=True):
            layer.self_attention.core_attention = cached.core_attention
