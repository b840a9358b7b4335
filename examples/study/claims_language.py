"""The theorems, in the language with a known optimum."""

from __future__ import annotations

import math
from itertools import pairwise

from claims import Claim, Comparison
from evidence import LAST, SFT_MODEL, Estimate, Study

_SECTION = "A language with a known optimum"
# Fixed after runs for tuning on seeds 0 and 1 (_OFF was 1.5 before these), before any on the study's seeds at scale.
_NEARER, _NEARER_BY_SMALL_STEPS, _OFF, _DRIFT = 10.0, 3.0, 2.0, 0.02


_LARGE_STEPS = (
    "At beta 1 the optimum of an iteration is the data itself. The step is the largest, in some runs it gives "
    "probability to responses that the language does not have, and runs differ by more than three seeds average out."
)


def claims(study: Study) -> list[Claim]:
    return [_equilibrium(study), _closed_form(study), _beta(study), _stays(study), _ends(study)]


def _equilibrium(study: Study) -> Claim:
    variants = {f"language: beta {beta}": _NEARER if beta < 4 else _NEARER_BY_SMALL_STEPS for beta in (1, 2, 4)}
    return Claim(
        "optimum",
        _SECTION,
        "Self-play goes to the data distribution",
        "Theorem 5.2: the global optimum of self-play is reached where the policy is the data distribution, and "
        "only there.",
        f"KL(data || policy), computed by listing all responses: after the last iteration at most 1/{_NEARER:.0f} "
        f"of what it was before, 1/{_NEARER_BY_SMALL_STEPS:.0f} with the largest beta, which takes the smallest "
        "steps. The floor is how near one comes by counting the same examples.",
        tuple(
            _factor(study, f"{study.variants[name].label}: last against before", name, LAST, nearer)
            for name, nearer in variants.items()
        ),
        ("language",),
        {"undecided": _LARGE_STEPS},
    )


def _factor(study: Study, words: str, variant: str, iteration: int, nearer: float = _NEARER) -> Comparison:
    before, after = study.values(variant, SFT_MODEL, "kl"), study.values(variant, iteration, "kl")
    ratios = [math.log(after[seed] / before[seed]) + math.log(nearer) for seed in after if seed in before]
    sides = (study.estimate(variant, iteration, "kl"), study.estimate(variant, SFT_MODEL, "kl"))
    return Comparison(words, *sides, Estimate.of(ratios), -1)


def _closed_form(study: Study) -> Claim:
    return Claim(
        "closed form",
        _SECTION,
        "An iteration goes as far as Theorem 5.4 says",
        "Theorem 5.4, for the logistic loss: the optimum of an iteration is p(t+1) proportional to p(t)^(1 - "
        "1/beta) p(data)^(1/beta).",
        "KL(data || policy) among the responses of the language after iterations 0 and 1, within a factor of "
        f"{_OFF} of what the theorem says of an iteration from the opponent there was.",
        tuple(
            _off(study, f"beta {beta}, iteration {i}: found against predicted", f"language: beta {beta}", i)
            for beta in (2, 4)
            for i in (0, 1)
        ),
        ("language",),
        {
            "fails": "The theorem is of the optimum of an iteration over the whole distribution; here an iteration "
            "ends after some steps on a sample, and what it lacks adds up over iterations.",
            "undecided": "The theorem is of the optimum of an iteration over the whole distribution; here an "
            "iteration ends after some steps on a sample, and what it lacks adds up over iterations.",
        },
    )


def _off(study: Study, words: str, variant: str, iteration: int) -> Comparison:
    found, aim = study.values(variant, iteration, "kl_within"), study.values(variant, iteration, "aim")
    ratios = [abs(math.log(found[seed] / aim[seed])) - math.log(_OFF) for seed in found if seed in aim]
    sides = (study.estimate(variant, iteration, "kl_within"), study.estimate(variant, iteration, "aim"))
    return Comparison(words, *sides, Estimate.of(ratios), -1)


def _beta(study: Study) -> Claim:
    names = [f"language: beta {beta}" for beta in (1, 2, 4)]
    comparisons = []
    for smaller, larger in pairwise(names):
        first, second = study.values(smaller, 0, "kl"), study.values(larger, 0, "kl")
        differences = Estimate.of([math.log(first[s] / second[s]) for s in first if s in second])
        sides = (study.estimate(smaller, 0, "kl"), study.estimate(larger, 0, "kl"))
        words = f"KL after iteration 0: {study.variants[smaller].label} against {study.variants[larger].label}"
        comparisons.append(Comparison(words, *sides, differences, -1))
    return Claim(
        "beta in the language",
        _SECTION,
        "A smaller beta takes a larger step",
        "After Theorem 5.4: a smaller regularization lets the policy move further from its opponent in an iteration.",
        "KL(data || policy) after iteration 0, where the step is all that differs.",
        tuple(comparisons),
        ("language",),
        {"undecided": _LARGE_STEPS},
    )


def _stays(study: Study) -> Claim:
    variant = "language: at the data"
    first, last = study.values(variant, SFT_MODEL, "kl"), study.values(variant, LAST, "kl")
    drifts = [last[seed] - first[seed] - _DRIFT for seed in last if seed in first]
    sides = (study.estimate(variant, LAST, "kl"), study.estimate(variant, SFT_MODEL, "kl"))
    return Claim(
        "stays",
        _SECTION,
        "A model that is at the data stays there",
        "Theorem 5.2: at the data distribution self-play is at rest.",
        f"A model that has learned the language by SFT plays against itself: the KL rises by less than {_DRIFT} nats.",
        (Comparison("last against before", *sides, Estimate.of(drifts), -1),),
        ("language",),
        {
            "fails": "At rest are expectations; on a finite sample the gradient is noise, and the model fits that "
            "sample.",
        },
    )


def _ends(study: Study) -> Claim:
    variant = "language: ends"
    iterations = 2 * study.scale.toy_iterations
    made = [len(result.rows) - 1 for result in study.results[variant].values() if result.error is None]
    early = Estimate.of([float(number - iterations) for number in made])
    return Claim(
        "ends",
        _SECTION,
        "The run ends by itself at the equilibrium",
        "Section 4.1: the game is over when the main player can no longer tell human from generated responses.",
        f"trainer.spin.stop_at_equilibrium.accuracy=0.55 ends the run before the last of {iterations} iterations, "
        f"and not before the KL has come to 1/{_NEARER:.0f}.",
        (
            Comparison(
                "iterations made, against those allowed", Estimate.of([float(n) for n in made]), None, early, -1
            ),
            _factor(study, "KL: last against before", variant, LAST),
        ),
        ("language",),
    )
