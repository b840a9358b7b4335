"""The loss against its formula in fp64, and the check that policy equals reference."""

from __future__ import annotations

import math

import pytest
import torch

from nemo_spin.errors import UserError
from nemo_spin.losses import LN_2, check_policy_equals_reference, spin_loss, spin_metrics


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
        with pytest.raises(UserError, match=r"has to be ln 2"):
            check_policy_equals_reference(first_step(**wrong), 0.1, "32")
