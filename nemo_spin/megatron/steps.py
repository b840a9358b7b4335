"""Passes over global batches of response groups: gradients, SFT steps, and log-probabilities of responses.

A global batch is a list that every process holds. Each data-parallel rank takes its share; losses are averaged over
the whole global batch, so that the micro-batch size, the number of data-parallel ranks and the padding of an incomplete
batch change nothing.
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

from nemo_spin.megatron import forward, packing
from nemo_spin.megatron.forward import MicroBatch, Objective
from nemo_spin.megatron.gpt import have_transformer_engine
from nemo_spin.megatron.micro_batches import G, Group, Single, Size, cut, share_out
from nemo_spin.megatron.optimizer import Optimizer
from nemo_spin.megatron.packing import ModelInput
from nemo_spin.megatron.sequences import ResponseGroup

T = TypeVar("T")

# In one pass through the pipeline: enough to keep its stages busy, few enough to hold their log-probabilities.
_MICRO_BATCHES_AT_A_TIME = 64


@dataclass(frozen=True, slots=True)
class Batching:
    """How sequences become tensors.

    vocab_size: real rows of the vocabulary; the rest is padding.
    pad_id: token id that fills up sequences on the right.
    micro_batch_size: items that go through the model together, at most.
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

    def collate(self, groups: Sequence[Group]) -> ModelInput:
        """The tensors of a micro-batch."""
        sequences = [group.sequences for group in groups]
        if not self._is_packed:
            return packing.padded(sequences, self.pad_id, self.multiple_of)
        return packing.packed(sequences, self.pad_id, self.multiple_of, share_prompts=not have_transformer_engine())


def own_micro_batches(
    groups: Sequence[G], batching: Batching, context: Callable[[list[G]], T] = lambda _: None
) -> list[MicroBatch[T]]:
    """This data-parallel rank's micro-batches of a global batch. context: of the groups in one, for the objective.

    Where there are fewer items than ranks, one is repeated with weight 0.
    """
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    shortest = min((group[-1:] for group in groups), key=lambda item: item.sequences.packed_tokens)

    def micro_batch(batch: list[G], weight: float) -> MicroBatch[T]:
        return MicroBatch(batching.collate(batch), context(batch), weight)

    own = share_out(groups, batching.size, size)[rank]
    return [micro_batch(batch, 1.0) if batch else micro_batch([shortest], 0.0) for batch in own]


def backward(
    optimizer: Optimizer,
    micro_batches: list[MicroBatch[T]],
    objective: Objective[T],
    vocab_size: int,
    denominator: int,
) -> dict[str, float]:
    """Leave the gradients of a global batch in the model. Returns the sums of the objective's values, on every rank.

    denominator: of the loss: what the global batch holds.
    """
    model = optimizer.model
    model.train()
    optimizer.zero_grad()
    # Undoes the average over data-parallel ranks.
    scale = parallel_state.get_data_parallel_world_size() / denominator
    values = forward.run(model, micro_batches, objective, vocab_size, forward_only=False, scale=scale)
    return _totals(model, micro_batches, values)


@torch.no_grad()
def evaluate(
    gpt: GPTModel, micro_batches: list[MicroBatch[T]], objective: Objective[T], vocab_size: int
) -> dict[str, float]:
    """The sums of the objective's values over a global batch, on every rank, without gradients."""
    gpt.eval()
    values = forward.run(gpt, micro_batches, objective, vocab_size, forward_only=True)
    return _totals(gpt, micro_batches, values)


def _totals(
    model: torch.nn.Module, micro_batches: Sequence[MicroBatch], values: Sequence[dict[str, Tensor]]
) -> dict[str, float]:
    """Weighted sums over this rank's micro-batches and over data-parallel ranks, in fp64."""
    weights = [micro_batch.weight for micro_batch in micro_batches]

    def total(name: str) -> Tensor:
        return torch.stack([each[name].double() * weight for each, weight in zip(values, weights, strict=True)]).sum()

    names = list(values[0])
    sums = torch.stack([total(name) for name in names]).to(next(model.parameters()).device)
    dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
    return dict(zip(names, sums.tolist(), strict=True))


def sft_step(optimizer: Optimizer, groups: Sequence[ResponseGroup], batching: Batching) -> dict[str, float]:
    """One optimizer step of supervised fine-tuning: the mean NLL over the response tokens of a global batch.

    groups: each with one response. Returns `loss` in nats per token, and what `Optimizer.step` says.
    """
    tokens = _response_tokens(groups)
    totals = backward(optimizer, _sft_micro_batches(groups, batching), _nll, batching.vocab_size, tokens)
    loss = totals["nll"] / tokens
    return {"loss": loss} | optimizer.step(loss).metrics()


def sft_nll(gpt: GPTModel, groups: Sequence[ResponseGroup], batching: Batching) -> tuple[float, int]:
    """The summed NLL of the response tokens of a global batch, in nats, and their number; on every rank.

    groups: each with one response.
    """
    totals = evaluate(gpt, _sft_micro_batches(groups, batching), _nll, batching.vocab_size)
    return totals["nll"], _response_tokens(groups)


def _nll(_: None, per_token_logps: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    nll = -per_token_logps.sum(-1).sum()
    return nll, {"nll": nll.detach()}


def _response_tokens(groups: Sequence[ResponseGroup]) -> int:
    return sum(len(response) for group in groups for response in group.responses)


def _sft_micro_batches(groups: Sequence[ResponseGroup], batching: Batching) -> list[MicroBatch[None]]:
    return own_micro_batches([Single(group) for group in groups], batching)


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

    def objective(_: None, per_token_logps: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return per_token_logps.sum(), {"logps": per_token_logps}

    gpt.eval()
    logps: dict[tuple[int, int], Tensor] = {}
    items = [Single(group, number) for number, group in enumerate(groups)]
    for batches in _slices(cut(items, batching.size), _MICRO_BATCHES_AT_A_TIME):
        micro_batches = [MicroBatch(batching.collate(batch), None) for batch in batches]
        values = forward.run(gpt, micro_batches, objective, batching.vocab_size, forward_only=True, progress=progress)
        for batch, micro_batch, value in zip(batches, micro_batches, values, strict=True):
            order = packing.response_order([item.sequences for item in batch])
            lengths = micro_batch.inputs.targets.lengths
            for (place, response), length, row in zip(order, lengths, value["logps"].cpu(), strict=True):
                logps[batch[place].number, response] = row[:length].clone()
    return [tuple(logps[i, response] for response in range(len(group.responses))) for i, group in enumerate(groups)]


def _slices(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))
