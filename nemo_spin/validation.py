"""Validation: the NLL of held-out human responses and, on request, SPIN's own figures on held-out rollouts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nemo_spin.config import SpinConfig
from nemo_spin.data.dataset import SFTDataset
from nemo_spin.data.order import index_batches
from nemo_spin.pairs import Example
from nemo_spin.reporting import Reporter
from nemo_spin.rollout_store import RolloutStore

if TYPE_CHECKING:
    from nemo_spin.model import MegatronGPTSPINModel

# Held-out examples draw other random numbers than those of the training data.
_FIRST_INDEX = 1 << 40


class Validation:
    """Measures a policy on the validation data. `rollouts` are those of the iteration under way."""

    def __init__(
        self,
        cfg: SpinConfig,
        model: MegatronGPTSPINModel,
        dataset: SFTDataset | None,
        directory: Path,
        reporter: Reporter,
    ) -> None:
        """dataset: None for no validation. directory: gets the rollouts."""
        self.cfg, self.model, self.dataset = cfg, model, dataset
        self.directory, self.reporter = directory, reporter
        self.begin(0)

    def begin(self, iteration: int) -> None:
        """Forget the rollouts of another iteration."""
        self.rollouts = RolloutStore(self.directory / f"iteration-{iteration:03d}", self.model.tokenizer.decode)

    def make_rollouts(self, iteration: int) -> None:
        """Let the reference respond to the first prompts of the data, unless it has, or was not asked to."""
        if len(self.rollouts) or not self._examples():
            return
        with self.reporter.rollouts(iteration, len(self._examples()), "held-out rollouts") as advance:
            self.rollouts.add(self._examples(), self.model.roll_out(self._examples(), iteration, advance))

    def measure(self, iteration: int) -> dict[str, float]:
        """`val_loss`, the mean NLL of a human response token in nats; with rollouts SPIN's own as `val/...`."""
        return {} if self.dataset is None else self._nll() | self._spin_metrics(iteration)

    def _nll(self) -> dict[str, float]:
        total_nll, total_tokens = 0.0, 0
        for indices in self._batches(len(self.dataset), self.cfg.loop.limit_val_batches):
            nll, tokens = self.model.validation_step([self.dataset[i] for i in indices.tolist()])
            total_nll, total_tokens = total_nll + nll, total_tokens + tokens
        return {"val_loss": total_nll / total_tokens} if total_tokens else {}

    def _spin_metrics(self, iteration: int) -> dict[str, float]:
        if not len(self.rollouts):
            return {}
        beta = self.cfg.spin.ref_policy_kl_penalty[iteration]
        pairs = [self.rollouts.pair(example) for example in self._examples()]
        totals: dict[str, float] = {}
        for indices in self._batches(len(pairs)):
            for name, value in self.model.spin_validation_step([pairs[i] for i in indices.tolist()], beta).items():
                totals[name] = totals.get(name, 0.0) + value
        return {f"val/{name}": total / len(pairs) for name, total in totals.items()}

    def _batches(self, examples: int, limit: int | float | None = None) -> Iterator[Tensor]:
        return index_batches(torch.arange(examples), self.cfg.global_batch_size, limit_batches=limit)

    def _examples(self) -> list[Example]:
        count = min(self.cfg.spin.held_out_rollouts, len(self.dataset or ()))
        return [replace(self.dataset[i], index=i + _FIRST_INDEX) for i in range(count)]
