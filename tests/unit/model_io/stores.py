"""For tests: a WeightStore of tensors in memory, and the zarr layout, which nothing else writes any more."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from nemo_spin.megatron.architecture import Architecture
from nemo_spin.model_io.contradictions import expected_tensors
from nemo_spin.model_io.stores.interface import Region, StoredTensor, WeightStore


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


def write_zarr(store: WeightStore, directory: Path) -> None:
    """As NeMo and tensorstore wrote it in 2024: [layers, ...] in chunks of a layer and half of its rows."""
    import tensorstore

    stacks: dict[str, list[Tensor]] = {}
    for name in store.tensors:
        layer = name.split(".")[2] if name.startswith("decoder.layers.") else None
        key = name if layer is None else name.replace(f"layers.{layer}.", "layers.", 1)
        stacks.setdefault("model." + key, []).append(store.read(name))
    for key, tensors in stacks.items():
        value = torch.stack(tensors) if ".layers." in key else tensors[0]
        chunks = [1, -(-value.shape[1] // 2), *value.shape[2:]] if ".layers." in key else [-(-len(value) // 2)]
        chunks += list(value.shape[len(chunks) :])
        dtype = {torch.bfloat16: "bfloat16", torch.float32: "<f4"}[value.dtype]
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": str(directory / key)},
            "metadata": {"dtype": dtype, "shape": list(value.shape), "chunks": chunks, "compressor": None},
        }
        array = tensorstore.open(spec, create=True).result()
        array[...] = value.float().numpy().astype(array.dtype.numpy_dtype)
    (directory / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr", "sharded_backend_version": 1}))
