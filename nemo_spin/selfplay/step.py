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
from nemo_spin.data.example import Example
from nemo_spin.megatron import steps
from nemo_spin.megatron.forward import MicroBatch, Objective
from nemo_spin.megatron.micro_batches import by_example, merged
from nemo_spin.megatron.optimizer import Optimizer
from nemo_spin.megatron.packing import Share, gather_rows, response_order
from nemo_spin.megatron.sequences import ResponseGroup
from nemo_spin.megatron.steps import Batching
from nemo_spin.selfplay.losses import PAPER, sft_loss, spin_loss, spin_metrics
from nemo_spin.selfplay.pairs import Pair, group_of_pair


def spin_step(
    optimizer: Optimizer, pairs: Sequence[Pair], beta: float, batching: Batching, loss: LossConfig = PAPER
) -> dict[str, float]:
    """One optimizer step on a global batch of pairs. Returns the metrics of the batch, the same on every rank.

    `loss`, `kl` and every `rewards/*` and `logps/*` is the mean over pairs; `tokens/chosen` and `tokens/rejected` the
    mean number of response tokens; with an SFT term `spin_loss` and `sft_loss` are the parts of `loss`, the latter
    without its weight; `grad_norm` is taken before clipping; `lr` is the learning rate of this step; `skipped` is 1
    where loss or gradient were not finite, and nothing was updated, else 0.
    """
    objective = spin_objective(beta, loss, steps.gradient_scale() / len(pairs))
    totals = steps.backward(optimizer, _micro_batches(pairs, batching), objective, batching.vocab_size)
    means = {name: value / len(pairs) for name, value in totals.items()}
    return means | optimizer.step(means["loss"]).metrics()


def spin_metrics_of(
    gpt: GPTModel, pairs: Sequence[Pair], beta: float, batching: Batching, loss: LossConfig = PAPER
) -> dict[str, float]:
    """The metrics of `spin_step` for a global batch, summed over its pairs, without a step; on every rank."""
    return steps.evaluate(gpt, _micro_batches(pairs, batching), spin_objective(beta, loss, 1.0), batching.vocab_size)


def _micro_batches(pairs: Sequence[Pair], batching: Batching) -> list[MicroBatch[PairRows]]:
    """This rank's; pairs of one example go through the model together as far as they can."""
    groups = [group_of_pair(pair) for pair in pairs]
    numbers: dict[Example, int] = {}
    examples = [numbers.setdefault(pair.example, len(numbers)) for pair in pairs]
    return [
        spin_micro_batch(pairs, groups, own, examples, weight, batching)
        for own, weight in steps.own_share(groups, batching, examples)
    ]


@dataclass(frozen=True, slots=True)
class PairRows:
    """The pairs of a micro-batch, in the order of their rejected responses, which stand behind all chosen ones.

    weights: fp32 [b]. reference, tokens: fp32 [b, 2], the reference's log-probability in nats and the number of tokens
    of chosen and rejected response. chosen: int64 [b], the row of each pair's chosen response. shares: see
    `gather_rows`.
    """

    weights: Tensor
    reference: Tensor
    tokens: Tensor
    chosen: Tensor
    shares: tuple[Share, ...]

    def to(self, device: torch.device) -> PairRows:
        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        shares = tuple((moved(here), moved(source)) for here, source in self.shares)
        return PairRows(*map(moved, (self.weights, self.reference, self.tokens, self.chosen)), shares)


def spin_micro_batch(
    pairs: Sequence[Pair],
    groups: Sequence[ResponseGroup],
    numbers: Sequence[int],
    examples: Sequence[int],
    weight: float,
    batching: Batching,
) -> MicroBatch[PairRows]:
    """What `share_out` put together. groups: each pair as one. numbers: those of it. weight: of each of its pairs."""
    runs = by_example(numbers, examples)
    together = merged(numbers, groups, examples)
    # Of each rejected response the number of its group, and its own among the group's rejected ones.
    order = [(group, response - 1) for group, response in response_order(together) if response > 0]
    of_pairs = [pairs[runs[group][turn]] for group, turn in order]
    chosen = torch.tensor([group for group, _ in order])
    turns = torch.tensor([turn for _, turn in order])
    here = [(turns == turn).nonzero().squeeze(1) for turn in range(max(map(len, runs)))]
    rows = PairRows(
        weights=torch.full((len(order),), weight),
        reference=torch.tensor([[pair.ref_chosen_logps, pair.ref_rejected_logps] for pair in of_pairs]),
        tokens=torch.tensor(
            [[len(pair.example.response_ids), len(pair.rejected_ids)] for pair in of_pairs], dtype=torch.float32
        ),
        chosen=chosen,
        shares=tuple((at, chosen[at]) for at in here),
    )
    return MicroBatch(batching.collate(together), rows)


def spin_objective(beta: float, loss: LossConfig, scale: float) -> Objective:
    """The sum of the losses of a micro-batch's pairs times `scale`, and the sums of their metrics.

    `loss` is what is minimized; with an SFT term, `spin_loss` and `sft_loss` are its parts.
    """

    def objective(micro_batch: MicroBatch[PairRows], per_token_logps: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logps = per_token_logps.sum(-1)
        pairs = micro_batch.context.to(logps.device)
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
            sums = {name: (value * pairs.weights).sum() for name, value in values.items()}
        return (losses * pairs.weights).sum() * scale, sums

    return objective
