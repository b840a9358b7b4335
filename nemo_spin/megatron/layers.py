"""The two layers that megatron-core's local spec needs where TransformerEngine and Apex are not installed.

`Norm` supports sequence parallelism, which megatron-core's own torch norm refuses; `CausalAttention` is torch's
scaled_dot_product_attention, which never holds the [s, s] score matrix of megatron-core's local attention, except for
rows so short that on a CPU the matrix is the faster way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nemo_spin.megatron.packing import AttentionRows, gather_rows

# Measured forward and backward, with 32 and 64 dimensions a head: a third of the kernel's time for rows of 16 tokens,
# 0.7 for 64, as much for 128.
_SHORT_ON_CPU = 96


@dataclass
class PackedRows(PackedSeqParams):
    """Tells `CausalAttention` what lies in a row of packed tokens.

    megatron-core hands it through to attention with each call, also where activations are computed again. What it looks
    at itself is `max_seqlen_q` and `max_seqlen_kv`: how many rotary angles are needed.
    """

    rows: AttentionRows | None = None


class Norm(torch.nn.Module):
    """LayerNorm or RMSNorm, after `config.normalization`; with zero-centred gamma the stored weight is gamma - 1."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.shape, self.eps = (hidden_size,), eps
        self.is_rms_norm = config.normalization == "RMSNorm"
        self.gamma_offset = 1.0 if config.layernorm_zero_centered_gamma else 0.0
        self.weight = torch.nn.Parameter(torch.full(self.shape, 1.0 - self.gamma_offset, dtype=config.params_dtype))
        parameters = [self.weight]
        if not self.is_rms_norm:
            self.bias = torch.nn.Parameter(torch.zeros(self.shape, dtype=config.params_dtype))
            parameters.append(self.bias)
        for parameter in parameters:
            # Under sequence parallelism each rank sees a part of the sequence: megatron-core sums marked gradients.
            parameter.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., hidden_size]; returns the same shape and dtype."""
        weight = self.weight + self.gamma_offset if self.gamma_offset else self.weight
        if self.is_rms_norm:
            return F.rms_norm(x, self.shape, weight, self.eps)
        return F.layer_norm(x, self.shape, weight, self.bias, self.eps)


class CausalAttention(MegatronModule):
    """Causal self-attention over whole sequences, padded on the right or packed.

    Causality alone keeps real tokens from seeing padding: no mask is needed. Packed tokens are laid out as padded rows
    for attention only, and a prompt that responses share is in the row of each of them.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: PackedRows | None = None,
        **_: Any,
    ) -> Tensor:
        """query [s, b, heads, d], key and value [s, b, groups, d] of this tensor-parallel rank -> [s, b, heads * d]."""
        if packed_seq_params is not None:
            return self._packed(query, key, value, packed_seq_params.rows)
        length, batch, heads, head_dim = query.shape
        out = self._attend(*(t.permute(1, 2, 0, 3) for t in (query, key, value)))
        return out.permute(2, 0, 1, 3).reshape(length, batch, heads * head_dim)

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, rows: AttentionRows) -> Tensor:
        """As `forward`, of [T, 1, ...] -> [T, 1, heads * d]."""
        slots = [gather_rows(t.squeeze(1), rows.index, rows.shares) for t in (query, key, value)]
        blocks = zip(*(t.split([count * length for count, length in rows.shapes]) for t in slots), strict=True)
        outputs = []
        for (count, length), block in zip(rows.shapes, blocks, strict=True):
            out = self._attend(*(t.unflatten(0, (count, length)).transpose(1, 2) for t in block))
            outputs.append(out.transpose(1, 2).flatten(0, 1))
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return gather_rows(out.flatten(1), rows.slot_of_token, ((rows.tokens, rows.slot_of_token),)).unsqueeze(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [b, heads, s, d], key and value [b, groups, s, d] -> [b, heads, s, d]."""
        # In 16 bits the kernel is the one that keeps scores and sums in 32.
        if query.is_cpu and query.dtype is torch.float32 and query.shape[2] <= _SHORT_ON_CPU:
            return _attend_with_scores(query, key, value, self.softmax_scale)
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.softmax_scale, enable_gqa=key.shape[1] != query.shape[1]
        )


def _attend_with_scores(query: Tensor, key: Tensor, value: Tensor, softmax_scale: float | None) -> Tensor:
    """Causal attention, holding its scores. Shapes as in `CausalAttention._attend`."""
    length, head_dim = query.shape[2:]
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    beyond = query.new_full((length, length), float("-inf")).triu_(1)
    # The query heads that share a group stand one below the other: its keys need not be repeated.
    stacked = (query * scale).unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    scores = (stacked @ key.transpose(2, 3)).unflatten(2, (-1, length)).add_(beyond)
    return (scores.softmax(-1).flatten(2, 3) @ value).view_as(query)
