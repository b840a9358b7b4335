"""The zarr layout, NeMo's default until 2024: a directory of chunk files per tensor, described by its `.zarray`.

Read through tensorstore, which also wrote it and knows its bf16; an optional dependency, because nothing writes this
layout any more.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemo_spin.errors import CheckpointError
from nemo_spin.model_io.stores.interface import Region, StoredTensor, check_file, damaged, refused_dtype
from nemo_spin.model_io.stores.stacked import MOST_EXPANSION, StackedStore, check_volume
from nemo_spin.model_io.untrusted.plain_data import read_json

_DTYPES = {
    "bfloat16": torch.bfloat16,
    "<f2": torch.float16,
    "<f4": torch.float32,
    "<f8": torch.float64,
}


class ZarrStore(StackedStore):
    """The weights of a zarr directory."""

    layout = "zarr"

    def __init__(self, directory: Path, prefix: str, origin: str, sizes: Mapping[str, int] | None = None) -> None:
        """prefix: before the names of weights. origin: names the checkpoint in messages.

        sizes: bytes of each file, by its path in the directory, where only the `.zarray` files are unpacked yet.
        Raises CheckpointError if tensorstore is not installed, or if chunks of a weight are missing or cut off.
        """
        _require_tensorstore(origin)
        self.directory = directory
        files = sorted(directory.glob("*/.zarray"))
        described = {file.parent.name: _describe(file, origin) for file in files}
        arrays = {name: StoredTensor(tuple(node["shape"]), _DTYPES[node["dtype"]]) for name, node in described.items()}
        super().__init__(arrays, prefix, origin)
        if sizes is None:
            found = (file for file in directory.rglob("*") if file.is_file())
            sizes = {file.relative_to(directory).as_posix(): file.stat().st_size for file in found}
        check_volume(self.tensors.values(), MOST_EXPANSION * sum(sizes.values()), origin)
        for name in sorted({key for key, _ in self._places.values()}):
            _check_chunks(name, described[name], sizes, origin, directory.name)

    def _read(self, key: str, region: Region) -> Tensor:
        import tensorstore

        spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(self.directory / key)}}
        try:
            found = tensorstore.open(spec, read=True).result()[region].read(order="C").result()
        except ValueError as error:
            raise damaged(self.origin, key, error) from error
        if found.dtype.name == "bfloat16":
            return torch.from_numpy(found.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(found)


def is_zarr(directory: Path) -> bool:
    """Whether the directory, which need not hold more than its description, is in the zarr layout."""
    return not (directory / ".metadata").is_file() and any(directory.glob("*/.zarray"))


def _require_tensorstore(origin: str) -> None:
    try:
        import tensorstore  # noqa: F401
    except ImportError:
        raise CheckpointError(
            f"{origin} is in the zarr layout, which needs tensorstore: pip install 'nemo-spin[zarr]', or re-save it as "
            "torch_dist (in NeMo 1 with dist_ckpt_format: torch_dist) with the NeMo release that wrote it."
        ) from None


def _describe(file: Path, origin: str) -> dict[str, Any]:
    try:
        node = read_json(file)
        shape, chunks, dtype = node["shape"], node["chunks"], node["dtype"]
        whole = all(type(n) is int and n > 0 for n in [*shape, *chunks]) and len(shape) == len(chunks)
        # A chunk is read as a whole.
        whole = whole and all(chunk <= size for size, chunk in zip(shape, chunks, strict=True))
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise CheckpointError(f"{origin} is damaged: {file.parent.name}/.zarray does not describe an array.")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise refused_dtype(origin, file.parent.name, dtype)
    return node


def _check_chunks(name: str, node: Mapping[str, Any], sizes: Mapping[str, int], origin: str, directory: str) -> None:
    """zarr takes a chunk that is not there for one full of zeros, so that a lost file would go unnoticed."""
    separator = node.get("dimension_separator") or "."
    grid = (range(-(-size // chunk)) for size, chunk in zip(node["shape"], node["chunks"], strict=True))
    is_plain = node.get("compressor") is None and not node.get("filters")
    needed = math.prod(node["chunks"]) * _DTYPES[node["dtype"]].itemsize if is_plain else 0
    for place in itertools.product(*grid):
        check_file(f"{name}/{separator.join(map(str, place))}", sizes, needed, origin, directory)
