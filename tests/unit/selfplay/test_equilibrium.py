"""How far generated responses are from human ones, against values computed by hand; when that ends a run."""

from __future__ import annotations

import math
import random

import pytest

from nemo_spin.config import EquilibriumConfig
from nemo_spin.data.example import Example
from nemo_spin.selfplay.equilibrium import equilibrium_metrics, in_words, is_reached, logps_gap, reason, token_overlap
from nemo_spin.selfplay.pairs import Pair

STOP = frozenset({9})


def pair(
    index: int, human: tuple[int, ...], generated: tuple[int, ...], human_logps: float = -1.0, logps: float = -1.0
) -> Pair:
    return Pair(Example(index, (1, 2), human), generated, "stop", human_logps, logps)


def limits(**given: float) -> EquilibriumConfig:
    return EquilibriumConfig(
        **(dict.fromkeys(("accuracy", "logps_gap", "exact_match", "token_overlap")) | given)  # type: ignore[arg-type]
    )


def test_the_gap_is_that_of_tokens_and_not_of_responses() -> None:
    pairs = [pair(0, (5, 9), (6, 9), -3.0, -1.0), pair(1, (5, 5, 5, 9), (6,) * 6, -9.0, -3.0)]
    values = logps_gap(pairs)
    # generated -4 over 8 tokens, human -12 over 6
    assert values["logps_gap"] == pytest.approx(-0.5 + 2.0)
    # shares: (-1 + 0.5 * 2) / 8 - (-3 + 2 * 2) / 6 = -1/6, and 1/6; two examples: sqrt(2 / 36 * 2 / 1)
    assert values["logps_gap_error"] == pytest.approx(1 / 3)


def test_the_error_of_the_gap_is_the_spread_of_gaps_of_many_samples() -> None:
    rng = random.Random(1)

    def sample(start: int) -> list[Pair]:
        pairs = []
        for index in range(start, start + 60):
            hardness = rng.gauss(1.0, 0.3)  # of the prompt: both responses have it, which a paired error does not count
            m, n = rng.randint(5, 20), rng.randint(5, 20)
            logps = [-hardness * m + rng.gauss(0, 0.5 * math.sqrt(m)), -hardness * n + rng.gauss(0, 0.5 * math.sqrt(n))]
            pairs.append(pair(index, (5,) * m, (6,) * n, *logps))
        return pairs

    found = [logps_gap(sample(60 * i)) for i in range(400)]
    gaps = [values["logps_gap"] for values in found]
    mean = math.fsum(gaps) / len(gaps)
    spread = math.sqrt(math.fsum((gap - mean) ** 2 for gap in gaps) / (len(gaps) - 1))
    errors = math.fsum(values["logps_gap_error"] for values in found) / len(found)
    assert errors == pytest.approx(spread, rel=0.1)


def test_several_pairs_of_an_example_count_as_one_in_the_error() -> None:
    once = [pair(0, (5, 9), (6, 9), -3.0, -1.0), pair(1, (5, 5, 5, 9), (6,) * 6, -9.0, -3.0)]
    assert logps_gap([*once, *once]) == pytest.approx(logps_gap(once))


@pytest.mark.parametrize("broken", [math.nan, -math.inf])
def test_log_probabilities_that_are_no_numbers_do_not_count(broken: float) -> None:
    whole = [pair(0, (5, 9), (6, 9), -3.0, -1.0), pair(1, (5, 9), (6, 9), -2.0, -1.0)]
    others = [pair(2, (5, 9), (5, 9), -1.0, broken), pair(3, (5, 9), (5, 9), broken)]
    assert logps_gap([*whole, *others]) == logps_gap(whole)
    assert logps_gap([pair(0, (5, 9), (5, 9), broken)]) == {}
    assert set(logps_gap(whole[:1])) == {"logps_gap"}
    assert equilibrium_metrics([pair(0, (5, 9), (5, 9), broken)], STOP) == {
        "equilibrium/exact_match": 1.0,
        "equilibrium/token_overlap": 1.0,
    }


@pytest.mark.parametrize(
    ("human", "generated", "overlap"),
    [
        ((), (), 1.0),
        ((4,), (), 0.0),
        ((4, 5, 6), (6, 5, 4), 1.0),
        ((4, 4, 5), (4, 5, 5, 6), 4 / 7),
        ((4, 5), (6, 7), 0.0),
    ],
)
def test_the_overlap_is_that_of_multisets(human: tuple[int, ...], generated: tuple[int, ...], overlap: float) -> None:
    assert token_overlap(human, generated) == pytest.approx(overlap)


def test_the_stop_token_is_no_part_of_the_overlap() -> None:
    pairs = [pair(0, (9,), (9,)), pair(1, (4, 9), (5, 9)), pair(2, (4, 9), (4,)), pair(3, (4, 9), (4, 9))]
    metrics = equilibrium_metrics(pairs, STOP)
    assert metrics["equilibrium/token_overlap"] == pytest.approx(3 / 4)
    # a response that was cut off is not the human one
    assert metrics["equilibrium/exact_match"] == pytest.approx(2 / 4)
    assert equilibrium_metrics([], STOP) == {}


NEAR = {
    "equilibrium/accuracy": 0.512,
    "equilibrium/logps_gap": -0.012,
    "equilibrium/logps_gap_error": 0.003,
    "equilibrium/exact_match": 0.25,
    "equilibrium/token_overlap": 0.8,
}


@pytest.mark.parametrize(
    ("given", "reached"),
    [
        ({}, False),
        ({"accuracy": 0.512}, True),
        ({"accuracy": 0.511}, False),
        ({"logps_gap": 0.012}, True),
        ({"logps_gap": 0.011}, False),
        ({"exact_match": 0.25}, True),
        ({"exact_match": 0.26}, False),
        ({"token_overlap": 0.8}, True),
        ({"token_overlap": 0.81}, False),
        ({"accuracy": 0.55, "logps_gap": 0.02, "exact_match": 0.2, "token_overlap": 0.7}, True),
        ({"accuracy": 0.55, "logps_gap": 0.02, "exact_match": 0.2, "token_overlap": 0.9}, False),
    ],
    ids=str,
)
def test_a_run_ends_when_every_limit_is_met(given: dict[str, float], reached: bool) -> None:
    assert is_reached(NEAR, limits(**given)) is reached


@pytest.mark.parametrize("name", ["accuracy", "logps_gap", "exact_match", "token_overlap"])
def test_what_is_not_measured_or_no_number_is_not_met(name: str) -> None:
    loosest = limits(accuracy=1.0, logps_gap=9.0, exact_match=0.01, token_overlap=0.01)
    assert is_reached(NEAR, loosest)
    assert not is_reached(NEAR | {f"equilibrium/{name}": math.nan}, loosest)
    assert not is_reached({key: value for key, value in NEAR.items() if key != f"equilibrium/{name}"}, loosest)


def test_the_reason_has_figures_and_limits() -> None:
    assert reason(NEAR, limits(accuracy=0.55, logps_gap=0.02), 3) == (
        "At equilibrium before iteration 3: accuracy 0.512 (at most 0.55), "
        "logps_gap -0.0120 nats per token (at most 0.02 from 0)."
    )
    assert in_words(NEAR, 3, 100, held_out=True) == (
        "Iteration 3: the generated response against the human one, on 100 held-out pairs: log-probability under the "
        "reference -0.012 +- 0.003 nats per token, 25.0% equal to it, overlap of tokens 0.800; told apart in iteration "
        "2 with accuracy 0.512 (by chance 0.5 +- 0.050)."
    )
