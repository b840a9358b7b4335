"""The paper's experiments, with numbers in words."""

from __future__ import annotations

from itertools import pairwise

from claims import Claim, Comparing, Comparison, from_half
from evidence import LAST, SFT_MODEL, Study
from numbers_task import ACCURACY
from tasks import C2ST, KL

_SECTION = "Numbers in words"
_NOISE_AT_THE_END = (
    "The gains shrink until they are of the size of the noise between four seeds: by then nine in ten sampled answers "
    "are right, and little is left to gain."
)


def claims(study: Study) -> list[Claim]:
    compare = Comparing(study, ACCURACY)
    last = study.scale.iterations - 1
    return [
        _iteration_0(study, compare),
        *_later_iterations(study, compare, last),
        _indistinguishable(study, last),
        *_against_sft(study, compare, last),
        _refresh(compare, last),
        _longer(study, compare, last),
        _mixing(compare, last),
        _responses(compare, last),
        _data(study, compare),
        *_betas(study, compare, last),
        _losses(compare, last),
        _limited_data(study, compare),
        _sizes(study, compare),
        _optimizer(compare, last),
    ]


def _iteration_0(study: Study, compare: Comparing) -> Claim:
    apart = Comparing(study, C2ST, from_half)
    return Claim(
        "iteration 0",
        _SECTION,
        "SPIN improves the SFT model",
        "Section 6.2: iteration 0 raises the average of the Open LLM Leaderboard by 2.66 points, the largest gain.",
        "After iteration 0: more sampled answers are right, and a classifier tells them less well from human ones.",
        (
            compare("right answers: iteration 0 against the SFT model", ("SPIN", 0), ("SPIN", SFT_MODEL)),
            apart("classifier's distance from guessing: the same", ("SPIN", 0), ("SPIN", SFT_MODEL), -1),
        ),
        ("iterations", "iterations c2st"),
    )


def _later_iterations(study: Study, compare: Comparing, last: int) -> list[Claim]:
    later = Claim(
        "later iterations",
        _SECTION,
        "Every later iteration improves the one before",
        "Section 6.2: iterations 1 to 3 go on to improve, each by less.",
        "Right answers after each iteration against the one before.",
        tuple(
            compare(f"right answers: iteration {i} against {i - 1}", ("SPIN", i), ("SPIN", i - 1))
            for i in range(1, last + 1)
        ),
        ("iterations",),
        {"undecided": _NOISE_AT_THE_END},
    )
    gains = [
        compare.changes(
            f"gain of iteration {i - 1} against that of iteration {i}",
            (("SPIN", i - 2 if i > 1 else SFT_MODEL), ("SPIN", i - 1)),
            (("SPIN", i - 1), ("SPIN", i)),
        )
        for i in range(1, last + 1)
    ]
    # `changes` has the earlier gain first: it is to be the larger one
    shrinking = Claim(
        "gains shrink",
        _SECTION,
        "The gains become smaller",
        "Section 6.2: the gain of iteration 0 is the largest, and the method comes to its limit.",
        "The gain of an iteration in right answers, against that of the iteration before.",
        tuple(gains),
        ("iterations",),
        {"undecided": _NOISE_AT_THE_END},
    )
    return [later, shrinking]


def _indistinguishable(study: Study, last: int) -> Claim:
    apart = Comparing(study, C2ST, from_half)
    return Claim(
        "indistinguishable",
        _SECTION,
        "In the end, generated and human answers can hardly be told apart",
        "Section 4.1 and Theorem 5.2: the game is over when the opponent can no longer be told from the human.",
        "The distance from 0.5 of a classifier that was trained to tell them apart: after the last iteration "
        "against the SFT model, and against iteration 0.",
        (
            apart(f"iteration {last} against the SFT model", ("SPIN", last), ("SPIN", SFT_MODEL), -1),
            apart(f"iteration {last} against iteration 0", ("SPIN", last), ("SPIN", 0), -1),
        ),
        ("iterations c2st",),
    )


def _against_sft(study: Study, compare: Comparing, last: int) -> list[Claim]:
    controls = ["further SFT", "further SFT, low lr"]
    stuck = Claim(
        "SFT is stuck",
        _SECTION,
        "Further SFT brings nothing",
        "Section 1: further SFT epochs on the same data do not improve the model, or harm it.",
        "As many steps of SFT on the careful answers as SPIN made: right answers do not rise.",
        tuple(
            compare(
                f"right answers: {study.variants[name].label} against the SFT model",
                (name, LAST),
                (name, SFT_MODEL),
                -1,
            )
            for name in controls
        ),
        ("iterations",),
        {
            "fails": "The paper's SFT model had seen these very data; here it had learned from careless people, "
            "and careful answers are news to it. That is the setting in which SPIN has something to teach, and so "
            "has SFT.",
        },
    )
    better = Claim(
        "better than SFT",
        _SECTION,
        "SPIN is better than as much further SFT",
        "Section 6.2: SPIN improves where SFT on the same data does not.",
        "Right answers after the last iteration, against as many steps of SFT in as many rounds, each with a fresh "
        "optimizer and schedule, at SPIN's learning rate and at 0.3 of it.",
        tuple(
            compare(
                f"right answers: iteration {last} against {study.variants[name].label}", ("SPIN", last), (name, LAST)
            )
            for name in controls
        ),
        ("iterations",),
        {
            "fails": "At the reference the expected gradient of SPIN is beta/2 times that of SFT, plus noise from "
            "the sampled answers. Where people never disagree, as here, the SFT gradient is all there is to know.",
        },
    )
    return [stuck, better]


def _refresh(compare: Comparing, last: int) -> Claim:
    return Claim(
        "refresh",
        _SECTION,
        "The opponent has to be renewed",
        "Section 4: the opponent is the policy of the iteration before; that is what makes it self-play.",
        "Right answers after the last iteration, against a run of which the reference stays the SFT model "
        "(model.spin.refresh_reference=false), as in DPO with generated answers.",
        (compare(f"right answers after iteration {last}: SPIN against without", ("SPIN", last), ("no refresh", last)),),
        ("controls",),
    )


def _longer(study: Study, compare: Comparing, last: int) -> Claim:
    names = [f"iteration 0 as long as 0 to {i}" for i in sorted({1, last})]
    return Claim(
        "longer",
        _SECTION,
        "More epochs in iteration 0 do not replace iterations",
        "Section 6.3, training epochs: training longer in iteration 0 does not reach iteration 1.",
        "Right answers after iteration t, against iteration 0 alone with as many steps.",
        tuple(
            compare(f"right answers: iteration {i} against {study.variants[name].label}", ("SPIN", i), (name, 0))
            for i, name in zip(sorted({1, last}), names, strict=True)
        ),
        ("controls",),
    )


def _mixing(compare: Comparing, last: int) -> Claim:
    return Claim(
        "mixing",
        _SECTION,
        "Mixing in the pairs of the iteration before helps",
        "Section 6.1: from iteration 1 on the paper trains on the pairs of the iteration before as well; it does "
        "not say what that brings.",
        "Right answers after the last iteration, against model.spin.replay_iterations=0, which makes about half of "
        "the steps, and against the same with as many steps (more epochs on its own pairs).",
        (
            compare(f"right answers after iteration {last}: with against without", ("SPIN", last), ("no mixing", last)),
            compare(
                f"right answers after iteration {last}: with against without, as many steps",
                ("SPIN", last),
                ("no mixing, equal steps", last),
            ),
        ),
        ("controls",),
        {
            "undecided": "Part of what mixing brings is its larger number of steps: beside as many steps on its own "
            "pairs the difference is of the size of the noise between four seeds.",
        },
    )


def _responses(compare: Comparing, last: int) -> Claim:
    return Claim(
        "responses",
        _SECTION,
        "Several responses to a prompt are better than seeing one again",
        "The paper has one response to each prompt. Of this package: the rejected term is noise of mean zero at "
        "first, and more responses average it.",
        "Right answers after the last iteration with model.spin.num_generations=2 and half of the epochs, against "
        "one response, both without mixing: as many steps on twice as many pairs.",
        (
            compare(
                f"right answers after iteration {last}: two responses against one",
                ("two responses", last),
                ("no mixing, equal steps", last),
            ),
        ),
        ("controls",),
        {
            "undecided": "The difference has the expected sign and the size of the noise between four seeds. Near the "
            "end few of the generated answers are wrong, and more of them say little that is new.",
        },
    )


def _data(study: Study, compare: Comparing) -> Claim:
    names = [f"data {size}" for size in study.scale.sizes]
    return Claim(
        "data",
        _SECTION,
        "More data, better",
        "Section 6.3, training size: iteration 0 on 14,000, 26,000 and 50,000 examples becomes better with each.",
        f"Right answers after iteration 0 on {', '.join(map(str, study.scale.sizes))} examples, two epochs each.",
        tuple(
            compare(f"right answers: {larger} against {smaller}", (larger, 0), (smaller, 0))
            for smaller, larger in pairwise(names)
        ),
        ("data",),
    )


def _betas(study: Study, compare: Comparing, last: int) -> list[Claim]:
    betas = sorted({*study.scale.betas, 5.0})
    names = ["SPIN" if beta == 5.0 else f"beta {beta:g}" for beta in betas]
    distance = Comparing(study, KL)
    closer = Claim(
        "beta",
        _SECTION,
        "A larger beta keeps the policy closer to its opponent",
        "Section 4.1: beta (lambda there) controls how far the policy moves from its opponent; Section 6.1 raises "
        "it from 0.1 to 5 for the last iteration.",
        "KL(opponent || policy) over the second half of iteration 0, as logged on the answers trained on, for "
        "neighbouring betas.",
        tuple(
            distance(f"beta {larger:g} against {smaller:g}", (name, 0), (before, 0), -1)
            for smaller, larger, before, name in zip(betas, betas[1:], names, names[1:], strict=False)
        ),
        ("beta kl",),
        {
            "undecided": "With a very large beta the loss of a pair is 0 or nearly linear, so that beta only scales "
            "the gradient, and Adam's steps do not depend on its scale.",
        },
    )
    improves = Claim(
        "any beta",
        _SECTION,
        "SPIN works over a wide range of beta",
        f"The paper uses 0.1 and 5; here from {betas[0]:g} to {betas[-1]:g}, at one learning rate.",
        "Right answers after the last iteration against the SFT model, and after iteration 0, where a beta too "
        "small for the learning rate shows first.",
        tuple(
            compare(f"right answers, beta {beta:g}: iteration {i} against the SFT model", (name, i), (name, SFT_MODEL))
            for beta, name in zip(betas, names, strict=True)
            for i in sorted({0, last})
        ),
        ("beta",),
        {
            "fails": "With a small beta the same loss is reached by a larger change: the policy runs away from its "
            "opponent in iteration 0, and later iterations have to bring it back.",
        },
    )
    return [closer, improves]


def _losses(compare: Comparing, last: int) -> Claim:
    return Claim(
        "losses",
        _SECTION,
        "The logistic loss is the best choice",
        "Section 4.1: the logistic loss is chosen for its non-negativity, smoothness and fast decay; a linear one "
        "(the correlation loss) has no bound, and lets the policy grow without limit.",
        "Right answers after the last iteration: logistic against the other losses that Section 5 names, at one beta.",
        tuple(
            compare(
                f"right answers after iteration {last}: logistic against {loss}", ("SPIN", last), (f"loss {loss}", last)
            )
            for loss in ("hinge", "exponential", "correlation")
        ),
        ("losses",),
        {
            "undecided": "Hinge and exponential stop pushing pairs that are told apart, as the logistic loss does, and "
            "come to about the same. The linear one does not stop: in iteration 0 its answers get worse than the SFT "
            "model's, as the paper expects of it.",
        },
    )


def _limited_data(study: Study, compare: Comparing) -> Claim:
    comparisons: list[Comparison] = []
    for size in study.scale.few:
        for name in (f"SFT on {size}", f"SFT on {size}, low lr"):
            words = f"right answers: SPIN against {study.variants[name].label}"
            comparisons.append(compare(words, (f"SPIN on {size}", 1), (name, LAST)))
    return Claim(
        "limited data",
        _SECTION,
        "With limited data SPIN is better than SFT",
        "Abstract: SPIN gets out of human data what SFT leaves in them, without any further data.",
        "Two iterations on few examples, with as many steps as on all of them, against as many steps of SFT.",
        tuple(comparisons),
        ("limited",),
        {
            "fails": "The answers never disagree and follow one rule, so that a few of them, learned by heart, say "
            "it all; SFT learns them faster than SPIN, whose loss is satisfied once human answers are likelier "
            "than the opponent's.",
        },
    )


def _sizes(study: Study, compare: Comparing) -> Claim:
    names = {shape: "SPIN" if shape == "base" else f"SPIN, {shape}" for shape in study.scale.shapes}
    last = min(2, study.scale.iterations) - 1
    return Claim(
        "sizes",
        _SECTION,
        "SPIN works for models of several sizes",
        "The paper has one model, of 7 billion parameters.",
        f"Right answers after iteration {last} against the SFT model.",
        tuple(
            compare(
                f"right answers, {study.scale.shapes[shape].label}: against the SFT model",
                (name, last),
                (name, SFT_MODEL),
            )
            for shape, name in names.items()
        ),
        ("sizes",),
    )


def _optimizer(compare: Comparing, last: int) -> Claim:
    return Claim(
        "rmsprop",
        _SECTION,
        "The paper's optimizer works too",
        "Section 6.1: RMSProp without weight decay. This package's default is Adam.",
        "Right answers after the last iteration with RMSProp at the same learning rate, against the SFT model.",
        (compare(f"right answers: iteration {last} against the SFT model", ("rmsprop", last), ("rmsprop", SFT_MODEL)),),
        ("controls",),
    )
