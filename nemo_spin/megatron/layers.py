"""The two layers that megatron-core's local spec needs where TransformerEngine and Apex are not installed.

`Norm` supports sequence parallelism, which megatron-core's own torch norm refuses; `CausalAttention` is torch's
scaled_dot_product_attention, which never holds the [s, s] score matrix of megatron-core's local attention.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


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
    """Causal self-attention over whole sequences.

    Batches are padded on the right, so that causality alone keeps real tokens from seeing padding: no mask is needed.
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

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any) -> Tensor:
        """query [s, b, heads, d], key and value [s, b, groups, d] of this tensor-parallel rank -> [s, b, heads * d]."""
        length, batch, heads, head_dim = query.shape
        query, key, value = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.softmax_scale, enable_gqa=key.shape[1] != heads
        )
        return out.permute(2, 0, 1, 3).reshape(length, batch, heads * head_dim)
