"""Self-play without NeMo: what the trainer does, from the plain-torch and megatron-core floors only, on toy models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from toy import fill_deterministically, sharded_tensors, toy_architecture

from nemo_spin.config import LossConfig, OptimConfig, RecomputeConfig, SamplingParams, SchedConfig
from nemo_spin.data.example import Example
from nemo_spin.generation.engine import Generator
from nemo_spin.generation.rules import Rules
from nemo_spin.megatron import setup, steps
from nemo_spin.megatron.gpt import build_gpt
from nemo_spin.megatron.optimizer import Optimizer
from nemo_spin.selfplay.losses import PAPER
from nemo_spin.selfplay.pairs import Pair, Rollout
from nemo_spin.selfplay.reference import Reference
from nemo_spin.selfplay.rollouts.roll_out import RolloutRequest, RolloutResult, roll_out
from nemo_spin.selfplay.step import spin_step

STOP = 7
BETA = 0.5


def examples(count: int = 7, seed: int = 3, vocab_size: int = 251) -> list[Example]:
    """Prompts of 3 to 7 and responses of 4 to 10 random tokens, the last one the stop token."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(8, vocab_size, (length,), generator=generator).tolist())

    return [Example(i, ids(3 + i % 5), (*ids(3 + i % 7), STOP)) for i in range(count)]


def optim(**changes: Any) -> OptimConfig:
    values: dict[str, Any] = {
        "name": "adam",
        "lr": (1e-3,),
        "weight_decay": 0.1,
        "betas": (0.9, 0.98),
        "eps": 1e-8,
        "sched": SchedConfig(name="CosineAnnealing", warmup_steps=2, constant_steps=0, min_lr=1e-4),
    }
    return OptimConfig(**(values | changes))


class SelfPlay:
    """A toy policy with optimizer, reference and generator."""

    def __init__(
        self,
        micro_batch_size: int = 2,
        precision: str = "32",
        sequence_parallel: bool = False,
        recompute: str | None = None,
        keep_reference: bool = False,
        architecture: dict[str, Any] | None = None,
        micro_batch_tokens: int | None = None,
        packed: bool | None = None,
        loss: LossConfig = PAPER,
        **optim_changes: Any,
    ) -> None:
        arch = toy_architecture(**(architecture or {}))
        self.architecture, self.loss = arch, loss
        self.gpt = build_gpt(
            arch, precision, sequence_parallel, RecomputeConfig(granularity=recompute, method=None, num_layers=None)
        )
        fill_deterministically(self.gpt)
        self.optimizer = Optimizer(self.gpt, optim(**optim_changes), gradient_clip_val=1.0)
        self.reference = Reference(self.gpt, keep_copy=keep_reference)
        multiple = setup.layout()[0] if sequence_parallel else 1
        self.batching = steps.Batching(arch.vocab_size, 0, micro_batch_size, multiple, micro_batch_tokens, packed)
        sampling = SamplingParams(
            use_greedy=False, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, end_strings=()
        )
        rules = Rules(
            sampling, arch.vocab_size, arch.max_sequence_length, seed=11, min_length=1, stop_ids=frozenset({STOP})
        )
        self.generator = Generator(self.gpt, rules, slots=4)

    def roll_out(self, data: list[Example], iteration: int) -> list[Rollout]:
        return self.respond(RolloutRequest(data, iteration)).rollouts

    def respond(self, request: RolloutRequest) -> RolloutResult:
        with self.reference.swapped_in():
            return roll_out(self.gpt, self.generator, request, 12, self.batching)

    def step(self, pairs: list[Pair]) -> dict[str, float]:
        metrics = spin_step(self.optimizer, pairs, BETA, self.batching, self.loss)
        self.reference.policy_moved()
        return metrics

    def iterations(self, count: int, data: list[Example], steps_each: int = 2) -> Iterator[dict[str, float]]:
        """The metrics of every step, with the rollouts of its iteration under "rollouts"."""
        for iteration in range(count):
            self.optimizer.start(1e-3, steps_each)
            rollouts = self.roll_out(data, iteration)
            pairs = as_pairs(data, rollouts)
            for _ in range(steps_each):
                yield self.step(pairs) | {"rollouts": [tuple(rollout.response.ids) for rollout in rollouts]}
            self.reference.refresh()

    def shards(self) -> list[tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor]]:
        """(key, global shape, offset, data) of every weight that this rank holds."""
        found = []
        for tensor in sharded_tensors(self.gpt.sharded_state_dict()):
            if tensor.data is not None and tensor.data.is_floating_point():
                shape = (1,) * tensor.prepend_axis_num + tuple(tensor.local_shape)
                data = tensor.data.detach().float().reshape(shape).clone()
                found.append((tensor.key, tuple(tensor.global_shape), tuple(tensor.global_offset), data))
        return found


def as_pairs(data: list[Example], rollouts: list[Rollout]) -> list[Pair]:
    return [Pair.of(example, rollout) for example, rollout in zip(data, rollouts, strict=True)]


def whole_weights(by_rank: list[list]) -> dict[str, torch.Tensor]:
    """Weights put together from the shards of all ranks."""
    whole: dict[str, torch.Tensor] = {}
    for key, shape, offset, data in (shard for shards in by_rank for shard in shards):
        target = whole.setdefault(key, torch.full(shape, float("nan")))
        target[tuple(slice(o, o + n) for o, n in zip(offset, data.shape, strict=True))] = data
    return whole


def relative_distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest |a - b| / |b| over tensors; embedding rows that only pad a layout are left out."""
    assert a.keys() == b.keys()
    worst = 0.0
    for key in a:
        rows = min(len(a[key]), len(b[key]))
        x, y = a[key][:rows].double(), b[key][:rows].double()
        assert not x.isnan().any()
        worst = max(worst, float((x - y).norm() / y.norm()))
    return worst
