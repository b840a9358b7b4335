"""Each loss against its formula in fp64, and the check that policy equals reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from nemo_spin.errors import UserError
from nemo_spin.selfplay.losses import (
    LN_2,
    PAPER,
    check_policy_equals_reference,
    rewards,
    sft_loss,
    spin_loss,
    spin_metrics,
)


@pytest.fixture
def logps() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [-30 * torch.rand(6, generator=generator, dtype=torch.float64) for _ in range(4)]


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_loss_and_gradient_are_those_of_the_formula(logps: list[torch.Tensor], beta: float) -> None:
    chosen, rejected, ref_chosen, ref_rejected = logps
    inputs = [t.float().requires_grad_() for t in logps]
    loss = spin_loss(*inputs, beta)
    loss.sum().backward()
    for i in range(6):
        margin = beta * ((chosen[i] - ref_chosen[i]) - (rejected[i] - ref_rejected[i])).item()
        assert loss[i].item() == pytest.approx(math.log1p(math.exp(-margin)), rel=1e-4, abs=1e-6)
        slope = -beta / (1 + math.exp(margin))
        expected = [slope, -slope, -slope, slope]
        assert [t.grad[i].item() for t in inputs] == pytest.approx(expected, rel=1e-4, abs=1e-6)


FORMULAS: dict[str, Callable[[float], float]] = {
    "logistic": lambda t: math.log1p(math.exp(-t)),
    "hinge": lambda t: max(0.0, 1 - t),
    "exponential": lambda t: math.exp(-t),
    "correlation": lambda t: 1 - t,
}
TOKENS = ([3, 17, 40, 8, 1, 22], [5, 17, 12, 30, 2, 9])
WEIGHT = 0.7


def minimized(four: list[float], tokens: tuple[int, int], beta: float, kind: str, e: float, mean: bool) -> float:
    """Of one pair, with the SFT term, in Python's floats."""
    chosen, rejected, ref_chosen, ref_rejected = four
    of_chosen, of_rejected = tokens if mean else (1, 1)
    margin = beta * ((chosen - ref_chosen) / of_chosen - (rejected - ref_rejected) / of_rejected)
    spin = (1 - e) * FORMULAS[kind](margin) + e * FORMULAS[kind](-margin)
    return spin + WEIGHT * -chosen / tokens[0]


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("kind", FORMULAS)
def test_every_loss_and_its_gradient_are_those_of_the_formula(
    logps: list[torch.Tensor], kind: str, smoothing: float, mean: bool
) -> None:
    beta, step = (3.0 if mean else 0.2), 1e-6
    inputs = [t.clone().requires_grad_() for t in logps]
    tokens = torch.tensor(TOKENS[0]).double(), torch.tensor(TOKENS[1]).double()
    loss = spin_loss(*inputs, beta, kind, smoothing, tokens if mean else None)
    loss = loss + WEIGHT * sft_loss(inputs[0], tokens[0])
    loss.sum().backward()
    for i in range(6):
        four = [t[i].item() for t in logps]
        lengths = TOKENS[0][i], TOKENS[1][i]
        assert loss[i].item() == pytest.approx(minimized(four, lengths, beta, kind, smoothing, mean), rel=1e-9)
        for which, tensor in enumerate(inputs):
            above, below = (
                minimized(
                    [x + sign * step * (j == which) for j, x in enumerate(four)], lengths, beta, kind, smoothing, mean
                )
                for sign in (1, -1)
            )
            assert tensor.grad[i].item() == pytest.approx((above - below) / (2 * step), rel=1e-5, abs=1e-7)


def test_margins_lie_on_both_sides_of_each_bend(logps: list[torch.Tensor]) -> None:
    # Otherwise a hinge that is never flat, or always, would pass.
    margins = spin_metrics(*logps, 0.2)["rewards/margins"]
    assert (margins > 1).any() and (margins < -1).any() and (margins.abs() < 1).any()


def test_averaged_rewards_are_those_of_the_mean_token(logps: list[torch.Tensor]) -> None:
    chosen, rejected, ref_chosen, ref_rejected = logps
    tokens = torch.tensor(TOKENS[0]), torch.tensor(TOKENS[1])
    metrics = spin_metrics(*logps, 0.3, tokens)
    torch.testing.assert_close(metrics["rewards/chosen"], 0.3 * (chosen / tokens[0] - ref_chosen / tokens[0]))
    torch.testing.assert_close(metrics["rewards/rejected"], 0.3 * (rejected / tokens[1] - ref_rejected / tokens[1]))
    torch.testing.assert_close(metrics["rewards/margins"], metrics["rewards/chosen"] - metrics["rewards/rejected"])
    whole = spin_metrics(*logps, 0.3)
    for name in ("logps/chosen", "logps/rejected", "kl"):
        assert torch.equal(metrics[name], whole[name])
    nothing = torch.zeros(1)
    assert rewards(nothing, nothing, 1.0, nothing).tolist() == [0.0]


def test_no_smoothing_is_the_plain_loss_to_the_last_bit(logps: list[torch.Tensor]) -> None:
    single = [t.float() for t in logps]
    chosen, rejected, ref_chosen, ref_rejected = single
    margin = 0.1 * (chosen - ref_chosen) - 0.1 * (rejected - ref_rejected)
    assert torch.equal(spin_loss(*single, 0.1), -torch.nn.functional.logsigmoid(margin))


def test_rewards_carry_beta_and_equal_policies_count_half(logps: list[torch.Tensor]) -> None:
    chosen, rejected, ref_chosen, ref_rejected = logps
    metrics = spin_metrics(chosen, rejected, ref_chosen, ref_rejected, 0.3)
    torch.testing.assert_close(metrics["rewards/chosen"], 0.3 * (chosen - ref_chosen))
    torch.testing.assert_close(metrics["rewards/margins"], metrics["rewards/chosen"] - metrics["rewards/rejected"])
    torch.testing.assert_close(metrics["kl"], -metrics["rewards/rejected"] / 0.3)
    at_reference = spin_metrics(chosen, rejected, chosen, rejected, 0.3)
    assert at_reference["rewards/accuracies"].tolist() == [0.5] * 6
    torch.testing.assert_close(spin_loss(chosen, rejected, chosen, rejected, 0.3), torch.full((6,), LN_2).double())


def first_step(**changes: float) -> dict[str, float]:
    metrics = {"loss": LN_2, "rewards/chosen": 0.0, "rewards/rejected": 0.0, "tokens/chosen": 50, "tokens/rejected": 70}
    return metrics | changes


def test_first_step_of_an_iteration_has_to_be_ln_2() -> None:
    check_policy_equals_reference(first_step(), 0.1, "32")
    check_policy_equals_reference(first_step(**{"rewards/chosen": 0.1 * 0.2}), 0.1, "bf16")
    # A stop token missing from both masks: margin 0 and loss ln 2, but not the reference's log-probabilities.
    both_shifted = {"rewards/chosen": 0.1 * 0.5, "rewards/rejected": 0.1 * 0.5}
    for wrong in (both_shifted, {"loss": 0.68}, {"loss": float("nan")}):
        with pytest.raises(UserError, match=r"so the loss has to be ln 2 = 0\.6931; it is"):
            check_policy_equals_reference(first_step(**wrong), 0.1, "32")


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("kind", FORMULAS)
def test_first_step_has_to_be_what_each_loss_is_at_a_margin_of_0(
    logps: list[torch.Tensor], kind: str, smoothing: float
) -> None:
    loss = replace(PAPER, loss_type=kind, label_smoothing=smoothing)
    chosen, rejected, *_ = logps
    at_reference = spin_loss(chosen, rejected, chosen, rejected, 0.1, kind, smoothing).mean().item()
    check_policy_equals_reference(first_step(loss=at_reference), 0.1, "32", loss)
    value = r"ln 2 = 0\.6931" if kind == "logistic" else "1"
    # Of another loss, of a stale reference, and of one whose shifts cancel in the margin.
    for wrong in (
        {"loss": 1.0 if kind == "logistic" else LN_2},
        {"loss": at_reference - 0.01},
        {"rewards/chosen": 0.05},
    ):
        with pytest.raises(UserError, match=rf"has to be {value}; it is"):
            check_policy_equals_reference(first_step(**({"loss": at_reference} | wrong)), 0.1, "32", loss)


@pytest.mark.parametrize(
    ("kind", "slope"), [("logistic", 0.5), ("hinge", 1.0), ("exponential", 1.0), ("correlation", 1.0)]
)
def test_the_loss_may_be_off_by_what_the_log_probabilities_may(kind: str, slope: float) -> None:
    loss = replace(PAPER, loss_type=kind)
    allowed = 2 * slope * 0.1 * 1e-3 * math.sqrt(70)
    at_zero = FORMULAS[kind](0)
    check_policy_equals_reference(first_step(loss=at_zero + 0.99 * allowed), 0.1, "32", loss)
    with pytest.raises(UserError):
        check_policy_equals_reference(first_step(loss=at_zero + 1.01 * allowed), 0.1, "32", loss)


def test_first_step_with_an_sft_term_looks_at_spins_part() -> None:
    loss = replace(PAPER, loss_type="hinge", sft_loss_weight=0.5)
    check_policy_equals_reference(first_step(loss=2.3, spin_loss=1.0, sft_loss=2.6), 0.1, "32", loss)
    with pytest.raises(UserError, match=r"so SPIN's part of the loss has to be 1; it is 1\.3000"):
        check_policy_equals_reference(first_step(loss=1.0, spin_loss=1.3, sft_loss=2.6), 0.1, "32", loss)


def test_averaged_log_probabilities_may_be_off_by_less() -> None:
    loss = replace(PAPER, preference_average_log_probs=True)
    allowed = 1e-3 / math.sqrt(50)
    check_policy_equals_reference(first_step(**{"rewards/chosen": 5 * 0.99 * allowed}), 5, "32", loss)
    # That much of the whole response would be rounding.
    for wrong in ({"rewards/chosen": 5 * 1.01 * allowed}, {"loss": LN_2 + 5 * 1.01 * allowed}):
        with pytest.raises(UserError, match=r"nats per token \(allowed"):
            check_policy_equals_reference(first_step(**wrong), 5, "32", loss)
