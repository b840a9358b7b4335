"""Every warning, on a run that deserves it and on one that almost does; and none on a run that went well."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_run import LN_2, Line, each, make

from nemo_spin.reporting.page.findings import find
from nemo_spin.reporting.page.run_directory import read_run

DOCS = Path(__file__).resolve().parents[4] / "docs" / "metrics.md"
STEPS = 40
Change = Callable[[list[Line]], Any]


def sets(kind: str = "train", **values: float) -> Change:
    """Set these values (dots for slashes) in every line of a kind."""
    return each(lambda line: line.update({name.replace(".", "/"): value for name, value in values.items()}), kind)


def curve(name: str, values: Callable[[int], float]) -> Change:
    """Let a metric follow a function of the step of the iteration, from 1."""
    return each(lambda line: line.update({name: values(line["iteration_step"])}))


def together(*changes: Change) -> Change:
    return lambda all_lines: [change(all_lines) for change in changes]


def drop(name: str) -> Change:
    return lambda all_lines: [line.pop(name, None) for line in all_lines]


def spikes(count: int) -> Change:
    return curve("grad_norm", lambda step: 50.0 if step % 10 == 5 and step < 10 * count else 0.5)


def val_losses(*ends: float) -> Change:
    def change(all_lines: list[Line]) -> None:
        for line in all_lines:
            if line["kind"] == "validation":
                line["val_loss"] = ends[0] if line["step"] == 0 else ends[line["iteration"] + 1]

    return change


def cut_after(step: int) -> Change:
    def change(all_lines: list[Line]) -> None:
        all_lines[:] = [line for line in all_lines if line["step"] <= step and line["kind"] != "end"]

    return change


moved = curve("loss", lambda step: LN_2 - (0.0 if step == 1 else 0.04))
accurate = curve("rewards/accuracies", lambda step: 0.5 if step == 1 else 0.57)

# check, a change that triggers it, one that almost does
CASES: dict[str, tuple[str, Change, Change]] = {
    "nan": ("not_finite", lambda ls: ls[20].update(loss=math.nan), lambda ls: ls[20].update(loss=0.4)),
    "infinity": ("not_finite", lambda ls: ls[20].update(grad_norm=math.inf), lambda ls: ls[20].update(grad_norm=2.0)),
    "first loss": (
        "first_loss",
        curve("loss", lambda step: 0.8 if step == 1 else 0.3),
        curve("loss", lambda step: 0.72 if step == 1 else 0.3),
    ),
    "unfinished": ("unfinished", cut_after(90), lambda ls: None),
    "ended early": ("unfinished", lambda ls: cut_early(ls), lambda ls: None),
    "chosen falls": (
        "falling_chosen",
        curve("rewards/chosen", lambda step: -0.3 * step / STEPS),
        curve("rewards/chosen", lambda step: -0.05 * step / STEPS),
    ),
    "chosen falls, no rewards": (
        "falling_chosen",
        together(drop("rewards/chosen"), curve("logps/chosen", lambda step: -200.0 - 20.0 * step / STEPS)),
        together(drop("rewards/chosen"), curve("logps/chosen", lambda step: -200.0 - 5.0 * step / STEPS)),
    ),
    "still": (
        "standing_still",
        together(sets(loss=LN_2 - 0.001), sets(**{"rewards.accuracies": 0.51})),
        together(moved, accurate),
    ),
    "worse": (
        "standing_still",
        together(curve("loss", lambda step: LN_2 + 0.001 * step), sets(**{"rewards.accuracies": 0.45})),
        together(moved, accurate),
    ),
    "kl": ("large_kl", sets(kl=45.0), sets(kl=20.0)),
    "kl, no lengths": (
        "large_kl",
        together(drop("tokens/rejected"), sets(kl=60.0)),
        together(drop("tokens/rejected"), sets(kl=45.0)),
    ),
    "accuracy": (
        "early_accuracy",
        together(curve("rewards/accuracies", lambda step: 0.5 if step < 4 else 0.995), drop("val/rewards/accuracies")),
        curve("rewards/accuracies", lambda step: 0.9 if step < 30 else 0.995),
    ),
    "held out": (
        "overfitting",
        sets("validation", **{"val.rewards.accuracies": 0.6}),
        sets("validation", **{"val.rewards.accuracies": 0.75}),
    ),
    "val_loss": ("rising_val_loss", val_losses(1.6, 1.5, 1.6, 1.5), val_losses(1.6, 1.5, 1.51, 1.52)),
    "val_loss at once": ("rising_val_loss", val_losses(1.6, 1.7, 1.7, 1.7), val_losses(1.6, 1.61, 1.61, 1.61)),
    "cut off": (
        "rollouts",
        lambda ls: [rollouts(ls, "rollout/finish_reason_length", 0.2)],
        lambda ls: [rollouts(ls, "rollout/finish_reason_length", 0.09)],
    ),
    "empty": (
        "rollouts",
        lambda ls: [rollouts(ls, "rollout/empty", 0.02)],
        lambda ls: [rollouts(ls, "rollout/empty", 0.005)],
    ),
    "repeated": (
        "rollouts",
        lambda ls: [rollouts(ls, "rollout/repeated", 0.06)],
        lambda ls: [rollouts(ls, "rollout/repeated", 0.04)],
    ),
    "skipped": (
        "skipped",
        lambda ls: ls.insert(30, warning(ls[29], "skipped_step")),
        lambda ls: ls.insert(30, warning(ls[29], "empty")),
    ),
    "left out": (
        "left_out",
        sets("rollout", **{"rollout.not_finite": 1e-4}),
        sets("rollout", **{"rollout.not_finite": 0.0}),
    ),
    "entropy": (
        "certain",
        sets("rollout", **{"rollout.entropy": 0.04}),
        sets("rollout", **{"rollout.entropy": 0.06}),
    ),
    "chosen fell for a while": (
        "falling_chosen",
        lambda ls: ls.insert(50, warning(ls[49], "falling_chosen")),
        lambda ls: ls.insert(50, warning(ls[49], "another")),
    ),
    "exact": (
        "rollouts",
        lambda ls: [rollouts(ls, "rollout/exact_match", 0.6)],
        lambda ls: [rollouts(ls, "rollout/exact_match", 0.4)],
    ),
    "spikes": ("gradients", spikes(3), spikes(2)),
    "clipped": ("gradients", sets(grad_norm=1.5), curve("grad_norm", lambda step: 0.9 if step % 10 == 5 else 1.5)),
}


def warning(before: Line, guard: str) -> Line:
    position = {name: before[name] for name in ("time", "step", "iteration")}
    return position | {"kind": "warning", "guard": guard, "text": "It fell."}


def rollouts(all_lines: list[Line], name: str, value: float) -> None:
    for line in all_lines:
        if name in line:
            line[name] = value


def cut_early(all_lines: list[Line]) -> None:
    """An end before the last step, as at a time limit."""
    cut_after(100)(all_lines)
    all_lines.append({"time": 2e9, "step": 100, "iteration": 2, "kind": "end"})


def checks(tmp_path: Path, change: Change) -> list[str]:
    return [finding.check for finding in find(read_run(make(tmp_path / "run", steps=STEPS, change=change)))]


def test_a_run_that_went_well_has_no_warnings(tmp_path: Path) -> None:
    assert checks(tmp_path, lambda all_lines: None) == []


@pytest.mark.parametrize("name", CASES)
def test_warned(name: str, tmp_path: Path) -> None:
    check, change, _ = CASES[name]
    assert set(checks(tmp_path, change)) == {check}


@pytest.mark.parametrize("name", CASES)
def test_not_warned(name: str, tmp_path: Path) -> None:
    check, _, almost = CASES[name]
    assert check not in checks(tmp_path, almost)


def test_the_thresholds_are_those_of_the_run(tmp_path: Path) -> None:
    cut_off = together(
        lambda ls: [rollouts(ls, "rollout/finish_reason_length", 0.2)], sets("rollout", **{"rollout.entropy": 0.04})
    )
    for guards, expected in (
        ("{cut_off: 0.3, entropy: 0.03}", []),
        ("{cut_off: null, entropy: null}", []),
        ("{cut_off: 0.15}", ["certain", "rollouts"]),
        ("{}", ["certain", "rollouts"]),
    ):
        directory = make(tmp_path / str(len(guards)), steps=STEPS, change=cut_off)
        config = directory / "config.yaml"
        config.write_text(config.read_text().replace("    ref_policy", f"    guards: {guards}\n    ref_policy"))
        assert guards in config.read_text()
        assert [finding.check for finding in find(read_run(directory))] == expected, guards


def test_other_losses_begin_elsewhere(tmp_path: Path) -> None:
    """Hinge, exponential and linear at 1; with an SFT term SPIN's part counts; a fixed reference is left behind."""
    first, later = curve("loss", lambda step: 1.0 if step == 1 else 0.4), sets(spin_loss=0.4)
    started_with = {
        "loss_type: hinge": first,
        "sft_loss_weight: 0.5": together(
            curve("loss", lambda step: 2.0), later, curve("spin_loss", lambda step: LN_2 if step == 1 else 0.4)
        ),
        "refresh_reference: false": curve("loss", lambda step: LN_2 if step == 1 else 0.4),
    }
    for number, (key, change) in enumerate(started_with.items()):
        directory = make(tmp_path / str(number), steps=STEPS, change=change)
        config = directory / "config.yaml"
        assert ("first_loss" in {f.check for f in find(read_run(directory))}) == (key != "refresh_reference: false")
        config.write_text(config.read_text().replace("    ref_policy", f"    {key}\n    ref_policy"))
        assert "first_loss" not in {f.check for f in find(read_run(directory))}, key
    late = curve("loss", lambda step: 0.4)
    run = make(tmp_path / "late", steps=STEPS, change=late)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("    ref_policy", "    refresh_reference: false\n    ref_policy"))
    first_losses = [f.title for f in find(read_run(run)) if f.check == "first_loss"]
    assert first_losses == ["Iteration 0 did not begin at ln 2"]


def test_a_short_or_running_iteration_is_not_judged_by_its_curves(tmp_path: Path) -> None:
    still = together(sets(loss=LN_2), sets(**{"rewards.accuracies": 0.5}))
    running = read_run(make(tmp_path / "running", iterations=1, change=together(still, cut_after(20))))
    assert [finding.check for finding in find(running)] == ["unfinished"]
    short = read_run(make(tmp_path / "short", steps=8, change=together(still, sets(kl=900.0))))
    assert find(short) == []


def test_a_resumed_run_that_ended_before_is_going_on(tmp_path: Path) -> None:
    directory = make(tmp_path / "run")
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"time": 2e9, "step": 100, "iteration": 2, "kind": "resume"}\n')
    run = read_run(directory)
    assert run.state == "unfinished: at step 100 of 120, in iteration 2 (from 0) of 3"
    assert [finding.check for finding in find(run)] == ["unfinished"]


def test_every_warning_names_a_section_that_there_is(tmp_path: Path) -> None:
    sections = set(re.findall(r"^#+ (.*)$", DOCS.read_text(encoding="utf-8").replace("`", ""), flags=re.MULTILINE))
    for number, (_, change, _) in enumerate(CASES.values()):
        for finding in find(read_run(make(tmp_path / str(number), steps=STEPS, change=change))):
            assert finding.section in sections
