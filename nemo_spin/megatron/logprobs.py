"""Log-probabilities of response tokens, from hidden states and an output layer that is sharded over the vocabulary.

Only the positions that predict a response token are multiplied with the output layer, and of those no more at a time
than fit `LOGITS_AT_A_TIME`: with a vocabulary of 128 thousand rows, logits are by far the largest tensor of a step.
Where all of them fit, they are kept for the backward pass, else they are computed again there, chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from nemo_spin.megatron.packing import Targets, gather_rows

# 256 MiB in fp32, and still 512 positions of a vocabulary of 128 thousand: enough to keep matrix units busy.
LOGITS_AT_A_TIME = 2**26


def target_logps(
    hidden: Tensor, weight: Tensor, targets: Targets, vocab_size: int, sequence_parallel: bool = False
) -> Tensor:
    """The log-probability of every response token given what comes before it.

    hidden: [s, b, h] after the final norm; under sequence parallelism this rank's part of s. weight: this
    tensor-parallel rank's rows of the output layer, [padded_vocab_rows / tensor_model_parallel_size, h]. vocab_size:
    rows from it on only pad, and have no part in the softmax.
    Returns fp32 [n], the same on every tensor-parallel rank.
    """
    if sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden)
    predictors = gather_rows(hidden.flatten(0, 1), targets.predictors, targets.shares)
    if not sequence_parallel:
        # Its backward pass sums what each rank's part of the vocabulary says; above, the gather's does.
        predictors = copy_to_tensor_model_parallel_region(predictors)
    return _TokenLogps.apply(predictors, weight, targets.ids, vocab_size)


def mask_vocab_padding(logits: Tensor, vocab_size: int) -> Tensor:
    """Set the logits of padding rows, those from `vocab_size` on, to -inf in place.

    logits: [..., padded_vocab_rows / tensor_model_parallel_size], this rank's part of the vocabulary.
    """
    rows = logits.shape[-1]
    real_rows = vocab_size - parallel_state.get_tensor_model_parallel_rank() * rows
    if real_rows < rows:
        # Behind autograd's back, which would copy the logits' gradient: where the probability is 0, it is 0 already.
        logits.detach()[..., max(real_rows, 0) :] = float("-inf")
    return logits


class _TokenLogps(torch.autograd.Function):
    """(hidden [n, h], weight [v, h] of this rank, token ids [n], vocab_size) -> fp32 [n]."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor, vocab_size: int) -> Tensor:
        chunks = list(_chunks(len(ids), len(weight)))
        own = _OwnPart(weight, ids)
        log_sums, of_targets = hidden.new_empty(2, len(ids), dtype=torch.float32)
        logits = None
        for chunk in chunks:
            logits = _logits(hidden[chunk], weight, vocab_size)
            log_sums[chunk] = logits.logsumexp(-1)
            of_targets[chunk] = own.of_targets(logits, chunk)
        log_sums, of_targets = _over_ranks(log_sums, of_targets)
        ctx.save_for_backward(hidden, weight, ids, log_sums)
        ctx.vocab_size = vocab_size
        ctx.logits = logits if len(chunks) == 1 and any(ctx.needs_input_grad) else None
        return of_targets - log_sums

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, weight, ids, log_sums = ctx.saved_tensors
        own = _OwnPart(weight, ids)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        of_hidden = torch.empty_like(hidden) if wants_hidden else None
        # Of many chunks the sum is rounded once.
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        for chunk in _chunks(len(ids), len(weight)):
            logits = _logits(hidden[chunk], weight, ctx.vocab_size) if ctx.logits is None else ctx.logits
            # d log p(target) / d logits = [is target] - p; what is not needed any more makes room for it.
            of_logits = logits.sub_(log_sums[chunk, None]).exp_().mul_(-grad[chunk, None])
            own.add_to_targets(of_logits, grad[chunk], chunk)
            of_logits = of_logits.to(weight.dtype)
            if of_hidden is not None:
                torch.mm(of_logits, weight, out=of_hidden[chunk])
            if of_weight is not None:
                _add_product(of_weight, of_logits.t(), hidden[chunk])
        ctx.logits = None
        return of_hidden, None if of_weight is None else of_weight.to(weight.dtype), None, None


class _OwnPart:
    """Where the logits of the tokens are in this rank's part of the vocabulary."""

    def __init__(self, weight: Tensor, ids: Tensor) -> None:
        local = ids - parallel_state.get_tensor_model_parallel_rank() * len(weight)
        self.is_here = (local >= 0) & (local < len(weight))
        self.columns = local.clamp(0, len(weight) - 1)

    def of_targets(self, logits: Tensor, chunk: slice) -> Tensor:
        values = logits.gather(1, self.columns[chunk, None]).squeeze(1)
        return torch.where(self.is_here[chunk], values, 0.0)

    def add_to_targets(self, of_logits: Tensor, grad: Tensor, chunk: slice) -> None:
        of_logits.scatter_add_(1, self.columns[chunk, None], torch.where(self.is_here[chunk], grad, 0.0)[:, None])


def _logits(hidden: Tensor, weight: Tensor, vocab_size: int) -> Tensor:
    """fp32 [rows, v], in memory of their own."""
    return mask_vocab_padding(torch.mm(hidden, weight.t()).float(), vocab_size)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total.add_(torch.mm(a, b))


def _chunks(count: int, columns: int) -> Iterator[slice]:
    """Slices of `count` rows with at most `LOGITS_AT_A_TIME` elements each; one at least."""
    rows = max(1, LOGITS_AT_A_TIME // columns)
    return (slice(start, start + rows) for start in range(0, max(count, 1), rows))


def _over_ranks(log_sums: Tensor, of_targets: Tensor) -> tuple[Tensor, Tensor]:
    """The log of the sum of exponentials over the whole vocabulary, and the target's logit, from those of each rank."""
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return log_sums, of_targets
    group = parallel_state.get_tensor_model_parallel_group()
    largest = log_sums.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    sums = torch.stack([(log_sums - largest).exp(), of_targets])
    dist.all_reduce(sums, group=group)
    return largest + sums[0].log(), sums[1]
