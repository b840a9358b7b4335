"""Attention over the cache against attention written out."""

from __future__ import annotations

import pytest
import torch

from nemo_spin.generation.cache import attend


@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_attend(dtype: torch.dtype, tolerance: float, scale: float | None) -> None:
    torch.manual_seed(0)
    batch, groups, heads, length, head_dim = 3, 2, 4, 20, 8
    query = torch.randn(batch, groups, heads, head_dim).to(dtype)
    stored = torch.randn(2, batch + 1, groups, length + 5, head_dim).to(dtype)
    keys, values = stored[:, :batch, :, :length]
    mask = torch.zeros(batch, 1, 1, length, dtype=dtype)
    for row, used in enumerate((20, 1, 7)):
        mask[row, ..., used:] = -torch.inf
    scores = torch.einsum("bgnd,bgld->bgnl", query.double(), keys.double()) * (scale or head_dim**-0.5) + mask.double()
    expected = torch.einsum("bgnl,bgld->bgnd", scores.softmax(dim=-1), values.double())
    found = attend(query, keys, values, mask, scale)
    assert found.dtype is dtype
    assert torch.allclose(found.double(), expected, atol=tolerance, rtol=tolerance)
