"""A WeightStore of tensors in memory, for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_spin.checkpoint.architecture import Architecture
from nemo_spin.checkpoint.contradictions import expected_tensors
from nemo_spin.checkpoint.weight_store import Region, StoredTensor


class MemoryStore:
    """largest: elements of the largest tensor that was asked for."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights
        self.tensors = {name: StoredTensor(tuple(t.shape), t.dtype) for name, t in weights.items()}
        self.largest = 0

    def read(self, name: str, region: Region | None = None) -> Tensor:
        found = self.weights[name][region] if region else self.weights[name]
        self.largest = max(self.largest, found.numel())
        return found.clone()


def random_store(architecture: Architecture, dtype: torch.dtype = torch.bfloat16) -> MemoryStore:
    generator = torch.Generator().manual_seed(0)
    shapes = expected_tensors(architecture)
    return MemoryStore({name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()})
