"""The same questions of real human text."""

from __future__ import annotations

from claims import Claim, Comparing, from_half
from evidence import LAST, SFT_MODEL, Study
from tasks import C2ST, NLL

_SECTION = "Real text: GSM8K"
_SPIN, _CONTROLS = "gsm8k: SPIN", ("gsm8k: further SFT", "gsm8k: further SFT, low lr")

_WEAK = (
    "A model of this size says little that is right: one in a hundred final answers, and a classifier tells nine in "
    "ten of its responses from human ones. It plays on the problems that it has learned by SFT, where a gain is not to "
    "be expected (docs/hyperparameters.md). Further SFT brings none in these figures either, though its NLL falls more."
)


def claims(study: Study) -> list[Claim]:
    apart, nll = Comparing(study, C2ST, from_half), Comparing(study, NLL)
    figures = {figure.key: Comparing(study, figure) for figure in study.known["gsm8k"].figures}
    last = study.scale.gsm8k_iterations - 1
    before, after = (_SPIN, SFT_MODEL), (_SPIN, last)
    improves = Claim(
        "text: iteration 0",
        _SECTION,
        "SPIN improves the SFT model",
        "Section 6.2, as above.",
        "After iteration 0, on held-out problems: a classifier tells generated from human answers less well, and "
        "more of the equations in sampled answers are right.",
        (
            apart("classifier's distance from guessing: iteration 0 against the SFT model", (_SPIN, 0), before, -1),
            figures["equations"]("right equations: the same", (_SPIN, 0), before),
        ),
        ("text c2st", "text equations"),
        {"undecided": _WEAK},
    )
    goes_on = Claim(
        "text: last iteration",
        _SECTION,
        "Iterations add up",
        "Section 6.2, as above.",
        "After the last iteration against iteration 0: the same two figures.",
        (
            apart(f"classifier's distance from guessing: iteration {last} against 0", after, (_SPIN, 0), -1),
            figures["equations"](f"right equations: iteration {last} against 0", after, (_SPIN, 0)),
        )
        if last
        else (),
        ("text c2st", "text equations"),
        {"undecided": _WEAK},
    )
    fits = Claim(
        "text: NLL",
        _SECTION,
        "SPIN learns the human answers",
        "Section 4: the policy raises the probability of human answers and lowers that of its opponent's.",
        "The NLL of held-out human answers after the last iteration against the SFT model.",
        (nll("NLL: last iteration against the SFT model", after, before, -1),),
        ("text nll",),
        {
            "fails": "Only the difference of the two log-probabilities is asked for; both may fall, and they do. "
            "model.spin.sft_loss_weight is against that.",
        },
    )
    better = Claim(
        "text: better than SFT",
        _SECTION,
        "SPIN is better than as much further SFT",
        "Section 6.2, as above.",
        "After the last iteration, against as many steps of SFT at SPIN's learning rate and at 0.3 of it.",
        tuple(
            comparison
            for name in _CONTROLS
            for comparison in (
                apart(
                    f"classifier's distance from guessing: against {study.variants[name].label}",
                    after,
                    (name, LAST),
                    -1,
                ),
                figures["equations"](f"right equations: against {study.variants[name].label}", after, (name, LAST)),
            )
        ),
        ("text c2st", "text equations"),
        {"undecided": _WEAK},
    )
    return [improves, *([goes_on] if last else []), fits, better]
