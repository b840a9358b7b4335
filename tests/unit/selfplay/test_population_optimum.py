"""The optimum of an iteration over a whole distribution, where every response can be listed: Theorems 5.2 and 5.4."""

from __future__ import annotations

import pytest
import torch

from nemo_spin.selfplay.losses import spin_loss

RESPONSES = 12


def distribution(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(RESPONSES, generator=generator, dtype=torch.float64).softmax(-1)


def population_loss(log_policy: torch.Tensor, data: torch.Tensor, reference: torch.Tensor, beta: float, **options):
    """The expectation over human responses (rows) and the reference's own (columns)."""
    pairs = [
        logps.expand(RESPONSES, RESPONSES).reshape(-1)
        for logps in (log_policy[:, None], log_policy[None, :], reference.log()[:, None], reference.log()[None, :])
    ]
    return (data[:, None] * reference[None, :]).reshape(-1) @ spin_loss(*pairs, beta, **options)


def optimum(data: torch.Tensor, reference: torch.Tensor, beta: float, **options) -> torch.Tensor:
    """The policy that a search from the reference ends at."""
    logits = reference.log().clone().requires_grad_()
    search = torch.optim.LBFGS(
        [logits], max_iter=2000, tolerance_grad=1e-12, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        search.zero_grad()
        loss = population_loss(logits.log_softmax(-1), data, reference, beta, **options)
        loss.backward()
        return loss

    search.step(closure)
    return logits.detach().softmax(-1)


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0, 10.0])
def test_an_iteration_ends_where_the_closed_form_of_the_paper_says(beta: float) -> None:
    data, reference = distribution(0), distribution(1)
    closed = reference ** (1 - 1 / beta) * data ** (1 / beta)
    torch.testing.assert_close(optimum(data, reference, beta), closed / closed.sum(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("beta", [0.1, 1.0, 10.0])
def test_at_the_data_there_is_nothing_to_gain(beta: float) -> None:
    data = distribution(0)
    logits = data.log().clone().requires_grad_()
    population_loss(logits.log_softmax(-1), data, data, beta).backward()
    torch.testing.assert_close(logits.grad, torch.zeros_like(logits), rtol=0.0, atol=1e-14)
    torch.testing.assert_close(optimum(data, data, beta), data, rtol=1e-9, atol=0.0)


def test_iterations_come_to_the_data() -> None:
    data, policy = distribution(0), distribution(1)
    distances = []
    for _ in range(6):
        distances.append(float((data * (data / policy).log()).sum()))
        policy = optimum(data, policy, beta=2.0)
    # half of the way in log-probabilities, a quarter of the KL where it is small
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] / distances[-2] == pytest.approx(0.25, abs=0.02)
