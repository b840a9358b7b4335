"""Validation: the NLL of held-out human responses and, on request, SPIN's own figures on held-out rollouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from nemo_spin.config import SpinConfig
from nemo_spin.data.dataset import SFTDataset
from nemo_spin.data.example import Example
from nemo_spin.data.order import index_batches
from nemo_spin.reporting.console import Reporter
from nemo_spin.runtime.kill_points import reached
from nemo_spin.selfplay.policy import Policy
from nemo_spin.selfplay.rollouts.iteration import IterationRollouts

# Held-out examples draw other random numbers than those of the training data.
_FIRST_INDEX = 1 << 40


class HeldOut:
    """The first examples of the validation data, with indices of their own."""

    def __init__(self, dataset: SFTDataset | None, count: int) -> None:
        self.digest = "" if dataset is None else dataset.digest
        self.indices = [_FIRST_INDEX + i for i in range(min(count, len(dataset or ())))]
        self._dataset = dataset

    def __getitem__(self, index: int) -> Example:
        return replace(self._dataset[index - _FIRST_INDEX], index=index)


class Validation:
    """Measures a policy on the validation data. `rollouts` are those of the iteration under way."""

    def __init__(
        self,
        cfg: SpinConfig,
        policy: Policy,
        dataset: SFTDataset | None,
        directory: Path,
        reporter: Reporter,
        interrupted: Callable[[], bool] | None = None,
    ) -> None:
        """dataset: None for no validation. directory: gets the rollouts. interrupted: see `Engine.generate`."""
        self.cfg, self.policy, self.dataset = cfg, policy, dataset
        self.held_out = HeldOut(dataset, cfg.spin.held_out_rollouts)
        self.rollouts = IterationRollouts(cfg, policy, self.held_out, directory, reporter, interrupted, held_out=True)

    def make_rollouts(self, stop: Callable[[], bool]) -> bool:
        """Let the reference respond to the first prompts of the data, unless it has, or was not asked to.

        stop: asked after each chunk of them whether to leave the rest. Returns whether it was told to.
        """
        return self.rollouts.make(self.held_out.indices, stop)

    def measure(self, iteration: int) -> dict[str, float]:
        """`val_loss`, the mean NLL of a human response token in nats; with rollouts SPIN's own as `val/...`."""
        return {} if self.dataset is None else self._nll() | self._spin_metrics(iteration)

    def _nll(self) -> dict[str, float]:
        total_nll, total_tokens = 0.0, 0
        for indices in self._batches(len(self.dataset), self.cfg.loop.limit_val_batches):
            nll, tokens = self.policy.validation_step([self.dataset[i] for i in indices.tolist()])
            reached("validation/batch")
            total_nll, total_tokens = total_nll + nll, total_tokens + tokens
        return {"val_loss": total_nll / total_tokens} if total_tokens else {}

    def _spin_metrics(self, iteration: int) -> dict[str, float]:
        indices = self.held_out.indices
        if not indices or self.rollouts.missing(indices):
            return {}
        beta = self.cfg.spin.ref_policy_kl_penalty[iteration]
        pairs = [self.rollouts.pair(index) for index in indices]
        totals: dict[str, float] = {}
        for indices in self._batches(len(pairs)):
            for name, value in self.policy.spin_validation_step([pairs[i] for i in indices.tolist()], beta).items():
                totals[name] = totals.get(name, 0.0) + value
        return {f"val/{name}": total / len(pairs) for name, total in totals.items()}

    def _batches(self, examples: int, limit: int | float | None = None) -> Iterator[Tensor]:
        return index_batches(torch.arange(examples), self.cfg.global_batch_size, limit_batches=limit)
