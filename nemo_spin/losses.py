"""The SPIN loss, and the figures derived from the same log-probabilities. Pure functions of [b] tensors."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from nemo_spin.errors import UserError

# Nats by which a response's log-probability may differ between two passes over the same weights, per square root of its
# number of tokens: rounding errors of single tokens are about independent. Padding to other lengths changes them.
_ROUNDING = {"32": 1e-3, "bf16": 5e-2}

LN_2 = math.log(2.0)
"""The loss when policy equals reference, as at the first step of every iteration: -log sigmoid(0)."""


def rewards(policy_logps: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    """beta * (log pi(y|x) - log ref(y|x)), the implicit reward of a response, in nats times beta. [b] -> [b]."""
    return beta * (policy_logps - ref_logps)


def spin_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float,
) -> Tensor:
    """The logistic SPIN loss of each pair, Chen et al. 2024 (arXiv 2401.01335), equation 4.7 with l(t) = log(1 + e^-t).

    policy_*_logps, ref_*_logps: [b], log-probability of the whole response given its prompt, in nats; `chosen` is the
        human response, `rejected` the one that the reference generated.
    beta: `ref_policy_kl_penalty` of the iteration (lambda in the paper), positive.

    Returns [b]: -log sigmoid(margin), not averaged, so that the caller can average over the global batch.
    """
    margin = rewards(policy_chosen_logps, ref_chosen_logps, beta) - rewards(
        policy_rejected_logps, ref_rejected_logps, beta
    )
    return -F.logsigmoid(margin)


def spin_metrics(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float,
) -> dict[str, Tensor]:
    """What to watch, per pair: each value is [b].

    `rewards/accuracies` is 1 where the margin is positive, 0.5 where it is exactly zero (policy equal to reference),
    else 0. `kl`, log ref(y'|x) - log pi(y'|x) of the response that the reference sampled, has the mean KL(ref || pi)
    per response, in nats, where it was sampled at temperature 1 from the whole vocabulary.
    """
    chosen = rewards(policy_chosen_logps, ref_chosen_logps, beta)
    rejected = rewards(policy_rejected_logps, ref_rejected_logps, beta)
    margins = chosen - rejected
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": margins,
        "rewards/accuracies": (margins > 0).to(margins.dtype) + 0.5 * (margins == 0).to(margins.dtype),
        "logps/chosen": policy_chosen_logps,
        "logps/rejected": policy_rejected_logps,
        "kl": ref_rejected_logps - policy_rejected_logps,
    }


def check_policy_equals_reference(metrics: dict[str, float], beta: float, precision: str) -> None:
    """Check the metrics of an iteration's first step: the loss is ln 2 and both rewards are 0, up to rounding.

    Catches at once a stale reference, a wrong mask, wrong log-probabilities, and dropout.
    metrics: means over the batch of `loss`, `rewards/chosen`, `rewards/rejected`, `tokens/chosen`, `tokens/rejected`.
    precision: "32" or "bf16". Raises UserError.
    """
    allowed = _ROUNDING[precision] * math.sqrt(max(metrics["tokens/chosen"], metrics["tokens/rejected"], 1.0))
    shifts = {name: metrics[f"rewards/{name}"] / beta for name in ("chosen", "rejected")}
    loss_shift = abs(metrics["loss"] - LN_2)
    if all(abs(shift) <= allowed for shift in shifts.values()) and loss_shift <= beta * allowed:
        return
    raise UserError(
        "At the first step of an iteration policy and reference are the same, so the loss has to be ln 2 = "
        f"{LN_2:.4f}; it is {metrics['loss']:.4f}, and the log-probabilities of chosen and rejected responses differ "
        f"from the reference's by {shifts['chosen']:+.4f} and {shifts['rejected']:+.4f} nats (allowed: {allowed:.4f}). "
        "The rollouts were made by other weights or read with another mask: remove the run's rollouts and start the "
        "iteration again; if it stays, please report it."
    )
