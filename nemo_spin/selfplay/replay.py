"""Which pairs an iteration trains on: its own and, from the second one on, those of the iterations before it.

A pair is known by its age (0 for the iteration's own generation, 1 for that of the iteration before), the index of its
example, and its number among the pairs of that example. What an epoch holds is a function of the settings, the
iteration and the epoch alone, and so a run that goes on sees what it would have seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_spin.config import SpinConfig
from nemo_spin.data.order import Share, epoch_order, epoch_size, num_batches, permutation


@dataclass(frozen=True, slots=True)
class Replay:
    """The pairs of every epoch of a run.

    shares: of the data files in an epoch. max_epochs: of each iteration. limit_train_batches: of the iteration's own
    pairs, see `num_batches`; replayed ones come beside them. pairs_per_example: responses to a prompt that make pairs.
    replay_weights: passes over the pairs of age 1, 2, ... in an epoch. shuffle: else own pairs come first, in the order
    of the data.
    """

    shares: Sequence[Share]
    global_batch_size: int
    max_epochs: Sequence[int]
    limit_train_batches: int | float
    pairs_per_example: int
    replay_weights: Sequence[float]
    seed: int
    shuffle: bool

    @classmethod
    def of_run(cls, cfg: SpinConfig, shares: Sequence[Share]) -> Replay:
        """shares: of the training data."""
        loop, spin = cfg.loop, cfg.spin
        return cls(
            shares, cfg.global_batch_size, loop.max_epochs, loop.limit_train_batches,
            spin.pairs_per_example, spin.replay_weights, cfg.seed, cfg.train_ds.shuffle,
        )  # fmt: skip

    @property
    def examples_per_epoch(self) -> int:
        """Examples whose pairs of an iteration's own generation are in one of its epochs."""
        examples = epoch_size(self.shares)
        pairs = examples * self.pairs_per_example
        batches = num_batches(pairs, self.global_batch_size, self.limit_train_batches)
        return max(1, min(pairs, batches * self.global_batch_size) // self.pairs_per_example)

    def ages(self, iteration: int) -> range:
        """Of the generations that are replayed in an iteration."""
        return range(1, 1 + min(len(self.replay_weights), iteration))

    def pairs_per_epoch(self, iteration: int) -> int:
        own = self.examples_per_epoch
        replayed = sum(_part(own, self.replay_weights[age - 1]) for age in self.ages(iteration))
        return (own + replayed) * self.pairs_per_example

    def epoch(self, iteration: int, epoch: int) -> Tensor:
        """int64 [pairs, 3]: age, index and number of every pair, in the order in which they are trained on.

        The pairs of an example follow each other, so that what they share is computed once.
        """
        ages = self.ages(iteration)
        indices = [self.examples(iteration, epoch), *(self._replayed(iteration, epoch, age) for age in ages)]
        examples = torch.cat([torch.stack((torch.full_like(i, age), i), dim=1) for age, i in enumerate(indices)])
        if ages and self.shuffle:
            examples = examples[permutation(len(examples), f"mixture {self.seed} {iteration} {epoch}")]
        numbers = torch.arange(self.pairs_per_example).repeat(len(examples))
        return torch.cat((examples.repeat_interleave(self.pairs_per_example, dim=0), numbers[:, None]), dim=1)

    def examples(self, iteration: int, epoch: int) -> Tensor:
        """int64 [examples_per_epoch]: indices of the examples of an epoch to which its own iteration responds."""
        before = sum(self.max_epochs[:iteration]) + epoch
        order = epoch_order(self.shares, self.seed, iteration, epoch, self.shuffle, before)
        return order[: self.examples_per_epoch]

    def _replayed(self, iteration: int, epoch: int, age: int) -> Tensor:
        """Indices of the examples of this age: those of an epoch of that iteration, as often as their weight says."""
        generation = iteration - age
        examples = self.examples(generation, epoch % self.max_epochs[generation])
        passes, part = divmod(_part(len(examples), self.replay_weights[age - 1]), len(examples))
        drawn = permutation(len(examples), f"replay {self.seed} {iteration} {epoch} {age}")[:part].sort().values
        return torch.cat((examples.repeat(passes), examples[drawn]))


def _part(examples: int, weight: float) -> int:
    return max(1, round(examples * weight))
