"""The order in which examples are seen: a pure function of (seed, iteration, epoch), the same in a resumed run."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nemo_spin.data.example import Example
from nemo_spin.errors import ConfigError


class Examples(Protocol):
    """What a data set has to have to be cut into batches."""

    def __getitem__(self, index: int) -> Example: ...


@dataclass(frozen=True, slots=True)
class Share:
    """How much of a file belongs to an epoch.

    num_examples: of the file. weight: passes over it, above 0: 0.5 for half of its examples, 2.0 for all of them twice.
    """

    num_examples: int
    weight: float

    @property
    def per_epoch(self) -> int:
        """Examples of an epoch that come from this file, at least one."""
        return max(1, round(self.num_examples * self.weight))


def epoch_size(shares: Sequence[Share]) -> int:
    """Number of examples in an epoch, those counted twice that are seen twice."""
    return sum(share.per_epoch for share in shares)


def epoch_order(
    shares: int | Sequence[Share], seed: int, iteration: int, epoch: int, shuffle: bool, epochs_before: int = 0
) -> Tensor:
    """Indices of the examples in the order of one epoch: int64 [epoch_size] on the CPU.

    shares: of the files whose examples follow each other; or the number of examples, each of which comes once.
    epochs_before: in the run. Of a file with a fractional weight every epoch of the run takes up where the one before
        has left, so that all its examples come before any of them does again.
    """
    files = [Share(shares, 1.0)] if isinstance(shares, int) else shares
    order = f"data order {seed} {iteration} {epoch}"
    if all(file.per_epoch == file.num_examples for file in files):
        size = epoch_size(files)
        return permutation(size, order) if shuffle else torch.arange(size)
    chosen, first = [], 0
    for number, file in enumerate(files):
        chosen.append(first + _chosen(file, f"{seed} {number}" if shuffle else None, epochs_before))
        first += file.num_examples
    indices = torch.cat(chosen)
    return indices[permutation(len(indices), order)] if shuffle else indices


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
    dataset: Examples,
    order: Tensor,
    global_batch_size: int,
    start_batch: int = 0,
    limit_batches: int | float | None = None,
) -> Iterator[list[Example]]:
    """As `index_batches`, with the examples themselves."""
    for indices in index_batches(order, global_batch_size, start_batch, limit_batches):
        yield [dataset[index] for index in indices.tolist()]


def _chosen(file: Share, name: str | None, epochs_before: int) -> Tensor:
    """The file's examples of an epoch, by their position in it: whole passes, and what is left of a fraction.

    name: of the order in which fractions go through the file; None for the file's own.
    """
    size = file.num_examples
    passes, part = divmod(file.per_epoch, size)
    indices = torch.arange(size).repeat(passes)
    position, left = epochs_before * part, part
    while left:
        turn, start = divmod(position, size)
        taken = min(left, size - start)
        order = torch.arange(size) if name is None else permutation(size, f"data part {name} {turn}")
        indices = torch.cat([indices, order[start : start + taken]])
        position, left = position + taken, left - taken
    return indices


def permutation(size: int, name: str) -> Tensor:
    """int64 [size]: the numbers from 0 to size - 1 in an order that is a function of the name."""
    digest = hashlib.sha256(name.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randperm(size, generator=generator)
