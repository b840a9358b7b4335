"""Attention in training beside the formula in fp64, on either side of the length from which a kernel takes over."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from nemo_spin.megatron import layers


def formula(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(scale Q K^T + causal mask) V in fp64, every query head with the keys of its group."""
    query, key, value = (t.double().permute(1, 2, 0, 3) for t in (query, key, value))
    key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], 1) for t in (key, value))
    scores = (scale * query @ key.transpose(-1, -2)).masked_fill(torch.ones(2 * [len(query[0, 0])]).triu(1) > 0, -1e300)
    return (scores.softmax(-1) @ value).permute(2, 0, 1, 3).flatten(2)


def attention_beside_formula(length: int, groups: int, softmax_scale: float | None) -> dict[str, float]:
    """The largest differences of the output and of the gradients, and how often a kernel of torch's was used."""
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    torch.manual_seed(length)
    config = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4, use_cpu_initialization=True)
    attention = layers.CausalAttention(config, 1, AttnMaskType.causal, "self", softmax_scale=softmax_scale)
    inputs = [torch.randn(length, 3, heads, 8, requires_grad=True) for heads in (4, groups, groups)]
    weights = torch.randn(length, 3, 32)
    kernel = torch.nn.functional.scaled_dot_product_attention
    with mock.patch.object(layers.F, "scaled_dot_product_attention", wraps=kernel) as used:
        out = attention(*inputs, None)
    (out * weights).sum().backward()
    exact_inputs = [t.detach().double().requires_grad_() for t in inputs]
    exact = formula(*exact_inputs, 8**-0.5 if softmax_scale is None else softmax_scale)
    (exact * weights).sum().backward()
    gradients = [float((a.grad - b.grad).abs().max()) for a, b in zip(inputs, exact_inputs, strict=True)]
    return {"out": float((out - exact).abs().max()), "gradients": max(gradients), "kernel": used.call_count}


@pytest.mark.parametrize("softmax_scale", [None, 0.7])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 5, 96, 97])
def test_attention_is_the_formula(workers: Any, length: int, groups: int, softmax_scale: float | None) -> None:
    (found,) = workers.run(attention_beside_formula, length, groups, softmax_scale)
    assert found["out"] < 1e-5
    assert found["gradients"] < 5e-5
    assert found["kernel"] == (length > 96)
