"""The SPIN losses, and the figures derived from the same log-probabilities. Pure functions of [b] tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_spin.config import LossConfig
from nemo_spin.errors import UserError

# Nats by which a response's log-probability may differ between two passes over the same weights, per square root of its
# number of tokens: rounding errors of single tokens are about independent. Padding to other lengths changes them.
_ROUNDING = {"32": 1e-3, "bf16": 5e-2}

LN_2 = math.log(2.0)
"""The logistic loss when policy equals reference, as at the first step of every iteration: -log sigmoid(0)."""

PAPER = LossConfig(loss_type="logistic", label_smoothing=0.0, sft_loss_weight=0.0, preference_average_log_probs=False)
"""The loss of the paper's experiments."""


@dataclass(frozen=True, slots=True)
class _Loss:
    """An l(t) of equation 4.7, for a margin t, in nats times beta.

    of: [b] -> [b]. at_zero: l(0); name: the same for people.
    rise: l(-t) - l(0) for a float t >= 0, of the logistic loss to first order: how far a margin that is too low by t
        lifts the loss.
    """

    of: Callable[[Tensor], Tensor]
    at_zero: float
    name: str
    rise: Callable[[float], float]


_LOSSES = {
    "logistic": _Loss(lambda t: -F.logsigmoid(t), LN_2, f"ln 2 = {LN_2:.4f}", lambda t: t / 2),
    "hinge": _Loss(lambda t: F.relu(1 - t), 1.0, "1", lambda t: t),
    "exponential": _Loss(lambda t: torch.exp(-t), 1.0, "1", lambda t: math.expm1(min(t, 700.0))),
    "correlation": _Loss(lambda t: 1 - t, 1.0, "1", lambda t: t),
}


def rewards(policy_logps: Tensor, ref_logps: Tensor, beta: float, tokens: Tensor | None = None) -> Tensor:
    """beta * (log pi(y|x) - log ref(y|x)), the implicit reward of a response, in nats times beta. [b] -> [b].

    tokens: [b], of each response; where they are given, the reward is that of its mean token.
    """
    difference = policy_logps - ref_logps
    return beta * (difference if tokens is None else _per_token(difference, tokens))


def spin_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float,
    loss_type: str = "logistic",
    label_smoothing: float = 0.0,
    tokens: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The SPIN loss l(margin) of each pair, Chen et al. 2024 (arXiv 2401.01335), equation 4.7.

    policy_*_logps, ref_*_logps: [b], log-probability of the whole response given its prompt, in nats; `chosen` is the
        human response, `rejected` the one that the reference generated.
    beta: `ref_policy_kl_penalty` of the iteration (lambda in the paper), positive.
    loss_type: "logistic" log(1 + e^-t), "hinge" max(0, 1 - t), "exponential" e^-t, "correlation" 1 - t. Assumption 5.1
        of the paper (monotonically decreasing, l'(0) < 0, convex) holds for all four, and with it Theorem 5.2: where
        the policy has the data's distribution it stays there, and elsewhere there is a beta at which it does not. That
        the next policy is proportional to p (p_data / p)^(1 / beta), Theorem 5.4, is shown for the logistic one, which
        the paper chose because it is non-negative and smooth with a tail that decays exponentially, so that margins do
        not grow without limit. The linear one has no lower bound.
    label_smoothing: e in (1 - e) l(t) + e l(-t); of the logistic loss that is cDPO (Mitchell 2023). It is convex, but
        rises again behind some margin, unless l is linear: the paper's Assumption 5.1 does not cover it.
    tokens: [b] each, of chosen and rejected responses; where they are given, rewards are those of the mean token.

    Returns [b], not averaged, so that the caller can average over the global batch. A margin of -89 and less makes the
    exponential loss infinite in fp32.
    """
    chosen_tokens, rejected_tokens = tokens or (None, None)
    margin = rewards(policy_chosen_logps, ref_chosen_logps, beta, chosen_tokens) - rewards(
        policy_rejected_logps, ref_rejected_logps, beta, rejected_tokens
    )
    loss = _LOSSES[loss_type].of
    if label_smoothing == 0.0:
        return loss(margin)
    return (1 - label_smoothing) * loss(margin) + label_smoothing * loss(-margin)


def sft_loss(policy_chosen_logps: Tensor, chosen_tokens: Tensor) -> Tensor:
    """The NLL of each human response, in nats per token: the mean over its tokens. [b] -> [b]."""
    return -_per_token(policy_chosen_logps, chosen_tokens)


def spin_metrics(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float,
    tokens: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Tensor]:
    """What to watch, per pair: each value is [b]. tokens: as in `spin_loss`, for `rewards/*`.

    `rewards/accuracies` is 1 where the margin is positive, 0.5 where it is exactly zero (policy equal to reference),
    else 0. `kl`, log ref(y'|x) - log pi(y'|x) of the response that the reference sampled, has the mean KL(ref || pi)
    per response, in nats, where it was sampled at temperature 1 from the whole vocabulary.
    """
    chosen_tokens, rejected_tokens = tokens or (None, None)
    chosen = rewards(policy_chosen_logps, ref_chosen_logps, beta, chosen_tokens)
    rejected = rewards(policy_rejected_logps, ref_rejected_logps, beta, rejected_tokens)
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


def check_policy_equals_reference(
    metrics: dict[str, float], beta: float, precision: str, loss: LossConfig = PAPER
) -> None:
    """Check the metrics of an iteration's first step: SPIN's loss is l(0) and both rewards are 0, up to rounding.

    l(0), whatever is smoothed, is ln 2 for the logistic loss and 1 for the others.

    Catches at once a stale reference, a wrong mask, wrong log-probabilities, and dropout.
    metrics: means over the batch of `loss` (`spin_loss` where an SFT term is added to it), `rewards/chosen`,
        `rewards/rejected`, `tokens/chosen`, `tokens/rejected`.
    precision: "32" or "bf16". Raises UserError.
    """
    expected = _LOSSES[loss.loss_type]
    lengths = [max(metrics[f"tokens/{name}"], 1.0) for name in ("chosen", "rejected")]
    if loss.preference_average_log_probs:
        allowed, unit = _ROUNDING[precision] / math.sqrt(min(lengths)), "nats per token"
    else:
        allowed, unit = _ROUNDING[precision] * math.sqrt(max(lengths)), "nats"
    shifts = {name: metrics[f"rewards/{name}"] / beta for name in ("chosen", "rejected")}
    name = "spin_loss" if loss.sft_loss_weight > 0 else "loss"
    loss_shift = abs(metrics[name] - expected.at_zero)
    # Both responses may be off: by twice as much the margin.
    if all(abs(shift) <= allowed for shift in shifts.values()) and loss_shift <= expected.rise(2 * beta * allowed):
        return
    subject = "SPIN's part of the loss" if loss.sft_loss_weight > 0 else "the loss"
    raise UserError(
        f"At the first step of an iteration policy and reference are the same, so {subject} has to be {expected.name}; "
        f"it is {metrics[name]:.4f}, and the log-probabilities of chosen and rejected responses differ from the "
        f"reference's by {shifts['chosen']:+.4f} and {shifts['rejected']:+.4f} {unit} (allowed: {allowed:.4f}). "
        "The rollouts were made by other weights or read with another mask: remove the run's rollouts and start the "
        "iteration again; if it stays, please report it."
    )


def _per_token(logps: Tensor, tokens: Tensor) -> Tensor:
    # A response without tokens has the log-probability 0.
    return logps / tokens.clamp(min=1)
