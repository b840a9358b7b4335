"""Guards against a collapse: from which value on they warn, and that noise does not set them off."""

from __future__ import annotations

import math
import random

import pytest

from nemo_spin.config import GuardsConfig
from nemo_spin.data.example import Example
from nemo_spin.selfplay.guards import TREND_STEPS, falling_chosen_warning, rollout_warnings, trend
from nemo_spin.selfplay.pairs import Pair, trainable

GUARDS = GuardsConfig(empty=0.01, repeated=0.05, cut_off=0.1, entropy=0.05, falling_chosen=0.5)
OFF = GuardsConfig(empty=None, repeated=None, cut_off=None, entropy=None, falling_chosen=None)
SOUND = {
    "rollout/responses": 640.0,
    "rollout/empty": 0.0,
    "rollout/repeated": 0.0,
    "rollout/finish_reason_length": 0.0,
    "rollout/entropy": 0.8,
    "rollout/not_finite": 0.0,
}


def warned(guards: GuardsConfig = GUARDS, are_samples: bool = True, **values: float) -> list[str]:
    summary = SOUND | {f"rollout/{name}": value for name, value in values.items()}
    return [warning.guard for warning in rollout_warnings(summary, 1, guards, are_samples)]


@pytest.mark.parametrize(
    ("guard", "metric", "limit"),
    [("empty", "empty", 0.01), ("repeated", "repeated", 0.05), ("cut_off", "finish_reason_length", 0.1)],
)
def test_shares_warn_from_their_threshold_on(guard: str, metric: str, limit: float) -> None:
    assert warned(**{metric: limit}) == [guard]
    assert warned(**{metric: limit - 0.001}) == []
    assert warned(OFF, **{metric: 1.0}) == []


def test_two_responses_are_no_share() -> None:
    assert warned(responses=16, empty=2 / 16) == []
    assert warned(responses=16, empty=3 / 16) == ["empty"]


def test_entropy_is_one_only_of_samples() -> None:
    assert warned(entropy=0.0499) == ["entropy"]
    assert warned(entropy=0.05) == []
    assert warned(are_samples=False, entropy=0.0) == []
    assert warned(OFF, entropy=0.0) == []
    assert warned(responses=0, entropy=0.0) == []
    assert rollout_warnings({k: v for k, v in SOUND.items() if k != "rollout/entropy"}, 0, GUARDS, True) == []


def test_a_warning_says_what_how_much_from_where_on_and_what_to_try() -> None:
    (warning,) = rollout_warnings(SOUND | {"rollout/empty": 0.25}, 2, GUARDS, True)
    for part in ("25.0% of the 640", "iteration 2", "model.spin.guards.empty: 0.01", "ref_policy_kl_penalty"):
        assert part in warning.text
    assert warning.text.endswith(".") and "\n" not in warning.text
    assert warned(OFF, not_finite=1 / 640) == ["reference_not_finite"], "it cannot be switched off"


def curves(chosen: float, margin: float, noise: float = 0.0, seed: int = 0) -> tuple[list[float], list[float]]:
    """Changes over the window, on a line with noise."""
    rng = random.Random(seed)
    positions = [step / (TREND_STEPS - 1) for step in range(TREND_STEPS)]
    return tuple([change * x + rng.gauss(0, noise) for x in positions] for change in (chosen, margin))


def test_a_falling_chosen_reward_warns_from_its_share_of_the_gain_on() -> None:
    for share, expected in ((0.55, True), (0.45, False), (-0.5, False)):
        found = falling_chosen_warning(*curves(-share, 1.0, noise=0.01), 0.5)
        assert (found is not None) == expected, share
    text = falling_chosen_warning(*curves(-0.75, 1.0, noise=1e-4), 0.5).text
    assert "fell by 0.75 while rewards/margins grew by 1 " in text and "falling_chosen: 0.5" in text
    assert falling_chosen_warning(*curves(-1.0, -1.0, noise=0.01), 0.5) is None, "the margin does not grow"
    assert falling_chosen_warning(*curves(-1.0, 1.0), None) is None
    assert falling_chosen_warning(*(values[1:] for values in curves(-1.0, 1.0)), 0.5) is None, "too few steps"


def test_noise_is_no_trend() -> None:
    # The fall is as large as the noise of a step: a line through so few points has it by chance.
    found = [falling_chosen_warning(*curves(0.0, 0.0, noise=1.0, seed=seed), 0.5) for seed in range(2000)]
    assert not any(found)
    drifts = [falling_chosen_warning(*curves(-3.0, 4.0, noise=1.0, seed=seed), 0.5) for seed in range(200)]
    assert sum(warning is not None for warning in drifts) > 150


def test_a_trend_is_the_least_squares_line() -> None:
    values = [0.3, 1.9, 0.7, 2.2, 2.1, 4.0]
    n, xs = len(values), range(len(values))
    mean_x, mean_y = sum(xs) / n, sum(values) / n
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, values, strict=True)) / sum(
        (x - mean_x) ** 2 for x in xs
    )
    rest = sum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in zip(xs, values, strict=True))
    error = math.sqrt(rest / (n - 2) / sum((x - mean_x) ** 2 for x in xs))
    assert trend(values) == pytest.approx((slope * (n - 1), slope / error))
    assert trend([1.0] * 5) == (0.0, 0.0)
    assert trend([3.0, 2.0, 1.0, 0.0]) == (-3.0, -math.inf)


def test_pairs_without_finite_reference_log_probabilities_are_left_out() -> None:
    def pair(index: int, chosen: float, rejected: float) -> Pair:
        return Pair(Example(index, (1,), (2,)), (3,), "stop", chosen, rejected)

    pairs = [pair(0, -1.0, -2.0), pair(1, math.nan, -2.0), pair(2, -1.0, -math.inf), pair(3, -3.0, -4.0)]
    assert [p.example.index for p in trainable(pairs)] == [0, 3]
    assert trainable(pairs[1:3]) == pairs[1:3]
