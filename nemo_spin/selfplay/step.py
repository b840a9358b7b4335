"""SPIN's optimizer step: pairs become micro-batches, and log-probabilities of their responses become the loss.

The loss is averaged over the pairs of the global batch. Pairs of one example share its prompt and its chosen response,
which are computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from nemo_spin.config import LossConfig
from nemo_spin.megatron import steps
from nemo_spin.megatron.forward import MicroBatch, Objective
from nemo_spin.megatron.optimizer import Optimizer
from nemo_spin.megatron.packing import Share, gather_rows, response_order
from nemo_spin.megatron.steps import Batching
from nemo_spin.selfplay.losses import PAPER, sft_loss, spin_loss, spin_metrics
from nemo_spin.selfplay.pairs import Pair, PairGroup, groups_of_pairs


def spin_step(
    optimizer: Optimizer, pairs: Sequence[Pair], beta: float, batching: Batching, loss: LossConfig = PAPER
) -> dict[str, float]:
    """One optimizer step on a global batch of pairs. Returns the metrics of the batch, the same on every rank.

    `loss`, `kl` and every `rewards/*` and `logps/*` is the mean over pairs; `tokens/chosen` and `tokens/rejected` the
    mean number of response tokens; with an SFT term `spin_loss` and `sft_loss` are the parts of `loss`, the latter
    without its weight; `grad_norm` is taken before clipping; `lr` is the learning rate of this step; `skipped` is 1
    where loss or gradient were not finite, and nothing was updated, else 0.
    """
    micro_batches, objective = _micro_batches(pairs, batching), spin_objective(beta, loss)
    totals = steps.backward(optimizer, micro_batches, objective, batching.vocab_size, denominator=len(pairs))
    means = {name: value / len(pairs) for name, value in totals.items()}
    return means | optimizer.step(means["loss"]).metrics()


def spin_metrics_of(
    gpt: GPTModel, pairs: Sequence[Pair], beta: float, batching: Batching, loss: LossConfig = PAPER
) -> dict[str, float]:
    """The metrics of `spin_step` for a global batch, summed over its pairs, without a step; on every rank."""
    return steps.evaluate(gpt, _micro_batches(pairs, batching), spin_objective(beta, loss), batching.vocab_size)


def _micro_batches(pairs: Sequence[Pair], batching: Batching) -> list[MicroBatch[PairRows]]:
    """This rank's; pairs of one example go through the model together as far as they can."""
    return steps.own_micro_batches(groups_of_pairs(pairs), batching, pair_rows)


@dataclass(frozen=True, slots=True)
class PairRows:
    """The pairs of a micro-batch, in the order of their rejected responses, which come after all chosen ones.

    reference, tokens: fp32 [b, 2], the reference's log-probability in nats and the number of tokens of chosen and
    rejected response. chosen: int64 [b], the row of each pair's chosen response. shares: see `gather_rows`.
    """

    reference: Tensor
    tokens: Tensor
    chosen: Tensor
    shares: tuple[Share, ...]


def pair_rows(groups: Sequence[PairGroup]) -> PairRows:
    """Of the groups in a micro-batch."""
    rejected = response_order([group.sequences for group in groups])[len(groups) :]
    pairs = [groups[row].pairs[response - 1] for row, response in rejected]
    chosen, responses = torch.tensor(rejected).T.contiguous()
    # Of each group one pair at a time, so that no chosen response comes twice within a share.
    shares = [(responses == response).nonzero().squeeze(1) for response in responses.unique()]
    return PairRows(
        reference=torch.tensor([[pair.ref_chosen_logps, pair.ref_rejected_logps] for pair in pairs]),
        tokens=torch.tensor([[len(p.example.response_ids), len(p.rejected_ids)] for p in pairs], dtype=torch.float32),
        chosen=chosen,
        shares=tuple((here, chosen[here]) for here in shares),
    )


def spin_objective(beta: float, loss: LossConfig) -> Objective[PairRows]:
    """The sum of the losses of a micro-batch's pairs, and the sums of their metrics.

    `loss` is what is minimized; with an SFT term, `spin_loss` and `sft_loss` are its parts.
    """

    def objective(pairs: PairRows, per_token_logps: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logps = per_token_logps.sum(-1)
        chosen = gather_rows(logps, pairs.chosen, pairs.shares)
        rejected = logps[-len(pairs.chosen) :]
        four = chosen, rejected, *pairs.reference.unbind(-1)
        chosen_tokens, rejected_tokens = pairs.tokens.unbind(-1)
        averaged = (chosen_tokens, rejected_tokens) if loss.preference_average_log_probs else None
        losses = spin_loss(*four, beta, loss.loss_type, loss.label_smoothing, averaged)
        values = {}
        if loss.sft_loss_weight > 0:
            nll = sft_loss(chosen, chosen_tokens)
            values = {"spin_loss": losses.detach(), "sft_loss": nll.detach()}
            losses = losses + loss.sft_loss_weight * nll
        with torch.no_grad():
            values |= spin_metrics(*four, beta, averaged)
            values |= {"loss": losses, "tokens/chosen": chosen_tokens, "tokens/rejected": rejected_tokens}
            sums = {name: value.sum() for name, value in values.items()}
        return losses.sum(), sums

    return objective
