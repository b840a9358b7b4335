"""The order in which examples are seen: a pure function of (seed, iteration, epoch), the same in a resumed run."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from nemo_spin.data.dataset import SFTDataset
from nemo_spin.errors import ConfigError
from nemo_spin.pairs import Example


def epoch_order(num_examples: int, seed: int, iteration: int, epoch: int, shuffle: bool) -> Tensor:
    """Indices of the examples in the order of one epoch: a permutation, int64 [num_examples] on the CPU."""
    if not shuffle:
        return torch.arange(num_examples)
    digest = hashlib.sha256(f"data order {seed} {iteration} {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randperm(num_examples, generator=generator)


def num_batches(num_examples: int, global_batch_size: int, limit: int | float | None = None) -> int:
    """Number of global batches in an epoch, the last of which may be smaller.

    limit: None, -1 or 1.0 for all; an int for that many at most; a float for a fraction of them, at least one
        when it is above 0. Raises ConfigError for other values.
    """
    total = -(-num_examples // global_batch_size)
    if limit is None or limit == -1:
        return total
    if limit < 0 or (isinstance(limit, float) and not limit <= 1.0):
        raise ConfigError(f"a limit of {limit} batches: use a count, a fraction up to 1.0, or -1 for all")
    if isinstance(limit, int):
        return min(limit, total)
    # the margin keeps 0.29 of 100 at 29, whose product is a hair less in floating point
    return min(total, max(1, math.floor(total * limit + 1e-6))) if limit > 0 else 0


def index_batches(
    order: Tensor, global_batch_size: int, start_batch: int = 0, limit_batches: int | float | None = None
) -> Iterator[Tensor]:
    """Yield the indices of the epoch's global batches, int64 [b] each, from number `start_batch` on.

    The last batch may be smaller, nothing is dropped. limit_batches: as in `num_batches`, counted from the epoch's
    start: a resumed epoch ends where it would have.
    """
    for batch in range(start_batch, num_batches(len(order), global_batch_size, limit_batches)):
        yield order[batch * global_batch_size : (batch + 1) * global_batch_size]


def batches(
    dataset: SFTDataset,
    order: Tensor,
    global_batch_size: int,
    start_batch: int = 0,
    limit_batches: int | float | None = None,
) -> Iterator[list[Example]]:
    """As `index_batches`, with the examples themselves."""
    for indices in index_batches(order, global_batch_size, start_batch, limit_batches):
        yield [dataset[index] for index in indices.tolist()]
