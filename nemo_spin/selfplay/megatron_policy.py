"""The policy in training: a Megatron GPT with its optimizer, its reference, and the engine that makes rollouts."""

from __future__ import annotations

import resource
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel

from nemo_spin.config import SpinConfig
from nemo_spin.data.example import Example
from nemo_spin.data.tokenizer import TextTokenizer
from nemo_spin.generation.interface import Engine
from nemo_spin.megatron import steps
from nemo_spin.megatron.optimizer import Optimizer
from nemo_spin.megatron.steps import Batching
from nemo_spin.selfplay.non_finite import Diagnosis, diagnose
from nemo_spin.selfplay.pairs import Pair, group_of_example, trainable
from nemo_spin.selfplay.policy import Policy
from nemo_spin.selfplay.reference import Reference
from nemo_spin.selfplay.rollouts.roll_out import Answer, Rollout, roll_out, score
from nemo_spin.selfplay.step import spin_metrics_of, spin_step


class MegatronPolicy(Policy):
    """See `Policy`; and what a checkpoint of a run holds of it.

    gpt, optimizer, reference: of this process's part of the model.
    """

    def __init__(
        self,
        gpt: GPTModel,
        tokenizer: TextTokenizer,
        cfg: SpinConfig,
        engine: Engine,
        train_batching: Batching,
        score_batching: Batching,
        max_new_tokens: int,
    ) -> None:
        """engine: generates with the weights that `gpt` has then. train_batching, score_batching: how sequences become
        tensors in training and validation, and where log-probabilities of rollouts are computed. max_new_tokens: of a
        generated response.
        """
        self.gpt, self._tokenizer, self._cfg, self._engine = gpt, tokenizer, cfg, engine
        self._train_batching, self._score_batching = train_batching, score_batching
        self._max_new_tokens = max_new_tokens
        self.optimizer = Optimizer(gpt, cfg.optim, cfg.loop.gradient_clip_val)
        self.reference = Reference(gpt, keep_copy=cfg.spin.keeps_reference)

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids)

    # ------------------------------------------------------------------------------------------ rollouts

    def rollout_settings(self, iteration: int) -> dict[str, Any]:
        return {
            "precision": self._cfg.precision,
            "max_new_tokens": self._max_new_tokens,
            **self._engine.settings,
            # A run that has ended stands at the start of an iteration that it does not have.
            "temperature": self._cfg.spin.temperature[min(iteration, len(self._cfg.spin.temperature) - 1)],
        }

    def roll_out(
        self,
        examples: Sequence[Example],
        iteration: int,
        progress: Callable[[str, int], None] | None = None,
        **hooks: Any,
    ) -> list[Rollout] | None:
        self._engine.temperature = self._cfg.spin.temperature[iteration]
        with self.reference.swapped_in():
            return roll_out(
                self.gpt,
                self._engine,
                examples,
                iteration,
                self._max_new_tokens,
                self._score_batching,
                progress,
                **hooks,
            )

    def score_given(
        self,
        examples: Sequence[Example],
        answers: Sequence[Sequence[Answer]],
        progress: Callable[[str, int], None] | None = None,
    ) -> list[Rollout]:
        with self.reference.swapped_in():
            return score(self.gpt, examples, answers, self._score_batching, progress)

    def given_answer(self, ids: Sequence[int]) -> Answer:
        return Answer(array("i", ids), "stop" if ids[-1] in self._engine.stop_ids else "length")

    def refresh_reference(self) -> str:
        self.reference.refresh()
        return self.reference.name()

    # ------------------------------------------------------------------------------------------ steps

    def start_lr_schedule(self, lr: float, total_steps: int, steps_done: int, fresh: bool) -> None:
        self.optimizer.start(lr, total_steps, steps_done, fresh)

    def train_step(self, pairs: Sequence[Pair], beta: float) -> dict[str, float]:
        metrics = spin_step(self.optimizer, trainable(pairs), beta, self._train_batching, self._cfg.spin.loss)
        if not metrics["skipped"]:
            self.reference.policy_moved()
        return metrics

    def diagnose(self, pairs: Sequence[Pair]) -> Diagnosis:
        return diagnose(self.gpt, pairs, self._train_batching)

    def validation_step(self, examples: Sequence[Example]) -> tuple[float, int]:
        return steps.sft_nll(self.gpt, [group_of_example(e) for e in examples], self._train_batching)

    def spin_validation_step(self, pairs: Sequence[Pair], beta: float) -> dict[str, float]:
        return spin_metrics_of(self.gpt, pairs, beta, self._train_batching, self._cfg.spin.loss)

    def peak_memory(self) -> int:
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    # ------------------------------------------------------------------------------------------ checkpoints

    @property
    def reference_is_needed(self) -> bool:
        """Whether a checkpoint has to hold the reference: it differs from the policy and may be swapped in again."""
        return self.reference.is_away

    def sharded_training_state(self, with_reference: bool, is_loading: bool) -> dict[str, Any]:
        """Policy, optimizer and, if asked for, reference, as megatron-core shards them."""
        policy = _without_extra_state(self.gpt.sharded_state_dict())
        state = {"policy": policy, "optimizer": self.optimizer.sharded_state_dict(policy, is_loading)}
        if with_reference:
            prefix = "ref_policy."
            state["ref_policy"] = _without_extra_state(self.gpt.sharded_state_dict(prefix=prefix))
            for name, shard in state["ref_policy"].items():
                shard.data = self.reference.weights[name.removeprefix(prefix)]
        return state

    def load_training_state(self, state: dict[str, Any], mid_iteration: bool) -> None:
        """The inverse of `sharded_training_state`. mid_iteration: the policy has moved away from its reference."""
        self.gpt.load_state_dict(state["policy"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        if "ref_policy" in state:
            self.reference.load({name.removeprefix("ref_policy."): t for name, t in state["ref_policy"].items()})
        else:
            self.reference.refresh()
        if mid_iteration or "ref_policy" in state:
            self.reference.policy_moved()


def _without_extra_state(state: dict[str, Any]) -> dict[str, Any]:
    """TransformerEngine keeps fp8 statistics there, which belong to a layout and are not used."""
    return {name: shard for name, shard in state.items() if not name.endswith("_extra_state")}
