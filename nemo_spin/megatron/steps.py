"""One optimizer step, and the forward passes beside it: SPIN, SFT, and the log-probabilities of responses.

A global batch is a list that every process holds. Each data-parallel rank takes its share; the loss is averaged over
the pairs (SPIN) or tokens (SFT) of the whole global batch, so that the micro-batch size, the number of data-parallel
ranks and the padding of an incomplete batch change nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from nemo_spin.config import LossConfig
from nemo_spin.megatron import forward, packing
from nemo_spin.megatron.forward import MicroBatch
from nemo_spin.megatron.gpt import have_transformer_engine
from nemo_spin.megatron.micro_batches import Size, cut, share_out
from nemo_spin.megatron.optimizer import Optimizer
from nemo_spin.megatron.packing import ModelInput
from nemo_spin.megatron.sequences import Example, Pair, ResponseGroup
from nemo_spin.selfplay.losses import PAPER
from nemo_spin.selfplay.spin_objective import PairRows, spin_micro_batch, spin_objective

T = TypeVar("T")

# In one pass through the pipeline: enough to keep its stages busy, few enough to hold their log-probabilities.
_MICRO_BATCHES_AT_A_TIME = 64


@dataclass(frozen=True, slots=True)
class Batching:
    """How sequences become tensors.

    vocab_size: real rows of the vocabulary; the rest is padding.
    pad_id: token id that fills up sequences on the right.
    micro_batch_size: items (pairs, examples) that go through the model together, at most.
    multiple_of: what is fed to the model has a length that is a multiple of it (the tensor-parallel size under sequence
        parallelism).
    micro_batch_tokens: in place of micro_batch_size, tokens that go through the model together, at most; an item that
        has more goes alone.
    packed: sequences lie one behind the other instead of being padded; None: where attention is our own, in which
        responses to a prompt share it. TransformerEngine's attention does not let them, and was never tried here.
    """

    vocab_size: int
    pad_id: int
    micro_batch_size: int
    multiple_of: int = 1
    micro_batch_tokens: int | None = None
    packed: bool | None = None

    @property
    def size(self) -> Size:
        return Size(
            self.micro_batch_size,
            self.micro_batch_tokens,
            padded=not self._is_packed,
            copied_prompts=have_transformer_engine(),
        )

    @property
    def _is_packed(self) -> bool:
        return not have_transformer_engine() if self.packed is None else self.packed

    def collate(self, groups: Sequence[ResponseGroup]) -> ModelInput:
        if not self._is_packed:
            return packing.padded(groups, self.pad_id, self.multiple_of)
        return packing.packed(groups, self.pad_id, self.multiple_of, share_prompts=not have_transformer_engine())


def _own_share(
    groups: Sequence[ResponseGroup], batching: Batching, examples: Sequence[int] | None = None
) -> list[tuple[list[int], float]]:
    """This data-parallel rank's micro-batches of a global batch: numbers of the items, and the weight of each item.

    examples: see `share_out`. Where there are fewer items than ranks, one is repeated with weight 0.
    """
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    own = share_out(groups, batching.size, size, examples)[rank]
    shortest = min(range(len(groups)), key=lambda i: groups[i].packed_tokens)
    return [(numbers or [shortest], float(bool(numbers))) for numbers in own]


def _total(values: Sequence[dict[str, Tensor]], device: torch.device) -> dict[str, float]:
    """Sums over this rank's micro-batches and over data-parallel ranks, in fp64."""
    names = list(values[0])
    sums = torch.stack([torch.stack([value[name].double() for value in values]).sum() for name in names]).to(device)
    dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
    return dict(zip(names, sums.tolist(), strict=True))


def _device(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device


def _gradient_scale() -> int:
    """Undoes the average over data-parallel ranks: our losses are already divided by what the global batch holds."""
    return parallel_state.get_data_parallel_world_size()


def spin_step(
    optimizer: Optimizer, pairs: Sequence[Pair], beta: float, batching: Batching, loss: LossConfig = PAPER
) -> dict[str, float]:
    """One optimizer step on a global batch of pairs. Returns the metrics of the batch, the same on every rank.

    `loss`, `kl` and every `rewards/*` and `logps/*` is the mean over pairs; `tokens/chosen` and `tokens/rejected` the
    mean number of response tokens; with an SFT term `spin_loss` and `sft_loss` are the parts of `loss`, the latter
    without its weight; `grad_norm` is taken before clipping; `lr` is the learning rate of this step; `skipped` is 1
    where loss or gradient were not finite, and nothing was updated, else 0.
    """
    objective = spin_objective(beta, loss, _gradient_scale() / len(pairs))
    totals = _train(optimizer, _spin_micro_batches(pairs, batching), objective, batching.vocab_size)
    means = {name: value / len(pairs) for name, value in totals.items()}
    return means | optimizer.step(means["loss"]).metrics()


@torch.no_grad()
def spin_metrics_of(
    gpt: GPTModel, pairs: Sequence[Pair], beta: float, batching: Batching, loss: LossConfig = PAPER
) -> dict[str, float]:
    """The metrics of `spin_step` for a global batch, summed over its pairs, without a step; on every rank."""
    gpt.eval()
    objective = spin_objective(beta, loss, _gradient_scale() / len(pairs))
    micro_batches = _spin_micro_batches(pairs, batching)
    values = forward.run(gpt, micro_batches, objective, batching.vocab_size, forward_only=True)
    return _total(values, _device(gpt))


def _spin_micro_batches(pairs: Sequence[Pair], batching: Batching) -> list[MicroBatch[PairRows]]:
    """The responses of a pair go through the model together, and so do pairs of one example as far as they can."""
    groups = [ResponseGroup.of_pair(pair) for pair in pairs]
    numbers: dict[Example, int] = {}
    examples = [numbers.setdefault(pair.example, len(numbers)) for pair in pairs]
    return [
        spin_micro_batch(pairs, groups, own, examples, weight, batching.collate)
        for own, weight in _own_share(groups, batching, examples)
    ]


def sft_step(optimizer: Optimizer, examples: Sequence[Example], batching: Batching) -> dict[str, float]:
    """One optimizer step of supervised fine-tuning: the mean NLL over the response tokens of a global batch.

    Returns `loss`, and `grad_norm`, `lr` and `skipped` as in `spin_step`.
    """
    tokens = sum(len(example.response_ids) for example in examples)

    def objective(micro_batch: MicroBatch[Tensor], per_token_logps: Tensor):
        weights = micro_batch.context.to(per_token_logps.device, non_blocking=True)
        nll = -(per_token_logps.sum(-1) * weights).sum()
        return nll * (_gradient_scale() / tokens), {"loss": nll.detach()}

    totals = _train(optimizer, _sft_micro_batches(examples, batching), objective, batching.vocab_size)
    loss = totals["loss"] / tokens
    return {"loss": loss} | optimizer.step(loss).metrics()


def _train(
    optimizer: Optimizer, micro_batches: list[MicroBatch], objective: forward.Objective, vocab_size: int
) -> dict[str, float]:
    optimizer.model.train()
    optimizer.zero_grad()
    values = forward.run(optimizer.model, micro_batches, objective, vocab_size, forward_only=False)
    return _total(values, _device(optimizer.model))


def _sft_micro_batches(examples: Sequence[Example], batching: Batching) -> list[MicroBatch[Tensor]]:
    groups = [ResponseGroup.of_example(example) for example in examples]
    return [
        MicroBatch(batching.collate([groups[i] for i in numbers]), torch.full((len(numbers),), weight))
        for numbers, weight in _own_share(groups, batching)
    ]


@torch.no_grad()
def sft_nll(gpt: GPTModel, examples: Sequence[Example], batching: Batching) -> tuple[float, int]:
    """The summed NLL of the response tokens of a global batch, in nats, and their number; on every rank."""

    def objective(micro_batch: MicroBatch[Tensor], per_token_logps: Tensor):
        nll = -(per_token_logps.sum(-1) * micro_batch.context.to(per_token_logps.device)).sum()
        return nll, {"nll": nll}

    gpt.eval()
    micro_batches = _sft_micro_batches(examples, batching)
    values = forward.run(gpt, micro_batches, objective, batching.vocab_size, forward_only=True)
    return _total(values, _device(gpt))["nll"], sum(len(example.response_ids) for example in examples)


@torch.no_grad()
def response_logps(
    gpt: GPTModel,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    batching: Batching,
    progress: Callable[[int], None] | None = None,
) -> list[Tensor]:
    """The log-probability of every token of every response given its prompt, in nats.

    Every process of a data-parallel replica passes the same sequences; replicas are independent of each other.
    Returns, in the order of the input, fp32 tensors [len(response)] on the CPU. `progress` is told how many sequences
    each micro-batch held.
    """
    groups = [ResponseGroup(prompt, (response,)) for prompt, response in zip(prompts, responses, strict=True)]
    return [logps for (logps,) in group_logps(gpt, groups, batching, progress)]


@torch.no_grad()
def group_logps(
    gpt: GPTModel,
    groups: Sequence[ResponseGroup],
    batching: Batching,
    progress: Callable[[int], None] | None = None,
) -> list[tuple[Tensor, ...]]:
    """As `response_logps`, of all responses of each group; where they are packed, their prompt is computed once."""

    def objective(micro_batch: MicroBatch[list[int]], per_token_logps: Tensor):
        return per_token_logps.sum(), {"logps": per_token_logps}

    gpt.eval()
    logps: dict[tuple[int, int], Tensor] = {}
    for numbers in _slices(cut(groups, batching.size), _MICRO_BATCHES_AT_A_TIME):
        micro_batches: list[MicroBatch[list[int]]] = [
            MicroBatch(batching.collate([groups[i] for i in own]), own) for own in numbers
        ]
        values = forward.run(gpt, micro_batches, objective, batching.vocab_size, forward_only=True, progress=progress)
        for micro_batch, value in zip(micro_batches, values, strict=True):
            own, lengths = micro_batch.context, micro_batch.inputs.targets.lengths
            order = packing.response_order([groups[i] for i in own])
            for (i, share), length, row in zip(order, lengths, value["logps"].cpu(), strict=True):
                logps[own[i], share] = row[:length].clone()
    return [tuple(logps[i, share] for share in range(len(group.responses))) for i, group in enumerate(groups)]


def _slices(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))
