"""The weights of a checkpoint, whatever it is written in: names, shapes and dtypes at once, values piece by piece.

Every family of checkpoints is read through this interface, so that loading into a model and converting into another
family know one kind of checkpoint only, and neither ever holds more than a piece of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nemo_spin.errors import CheckpointError, one_line

EMBEDDING = "embedding.word_embeddings.weight"
POSITIONS = "embedding.position_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"
LAYERS = "decoder.layers."

# For each axis the half-open range [start, stop) of what is wanted.
Region = tuple[slice, ...]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class WeightStore(Protocol):
    """tensors: by megatron-core's names, without a prefix and with layers one by one
    ("decoder.layers.0.mlp.linear_fc1.weight"), see `architecture.layer_tensors` and `outer_tensors`.
    """

    @property
    def tensors(self) -> Mapping[str, StoredTensor]: ...

    def read(self, name: str, region: Region | None = None) -> Tensor:
        """A tensor, or a region of it, on the CPU in its stored dtype; the caller may keep and change it.

        Raises CheckpointError if it cannot be read.
        """
        ...


def damaged(origin: str, what: str, error: BaseException) -> CheckpointError:
    return CheckpointError(
        f"{origin}: {what} cannot be read ({type(error).__name__}: {one_line(error)[:200]}): it is damaged; copy it "
        "again or use another checkpoint."
    )


def incomplete(origin: str, what: str) -> CheckpointError:
    return CheckpointError(f"{origin} is incomplete: {what}; copy it again or use another checkpoint.")


def check_file(name: str, sizes: Mapping[str, int], needed: int, origin: str, directory: str) -> None:
    """Raises CheckpointError unless a file of the directory is there with at least the bytes that are needed.

    sizes: bytes of each file that is there.
    """
    if name not in sizes:
        raise incomplete(origin, f"{directory}/{name} is missing")
    if sizes[name] < needed:
        raise incomplete(origin, f"{directory}/{name} is truncated ({sizes[name]} bytes, at least {needed} are needed)")


def refused_dtype(origin: str, name: str, dtype: object) -> CheckpointError:
    return CheckpointError(f"{origin} stores {name} as {dtype}, which is not supported: re-save it in bf16 or fp32.")
