"""Runs that are killed at every named point end, when they are started again, as if nothing had happened."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import pytest
import torch
from killable import EXAMPLES, STEPS, At, KillableRun, Layout, Outcome, make_inputs
from run_endings import differences
from run_notes import every_example_once
from selfplay import relative_distance

PACKAGE = Path(__file__).resolve().parents[2] / "nemo_spin"

# Each chain is one run, killed at one place after the other and then left alone. A point's number counts from the start
# of the processes.
CHAINS = {
    "rollouts": (
        At("run/started"),
        At("held_out/part", rank=0),
        At("rollouts/response", times=5),
        At("rollouts/scored"),
        At("rollouts/part", rank=0),
        At("validation/batch", times=2, rank=3),
        At("train/step", times=2, rank=1),
        At("train/step", times=5),
    ),
    "checkpoints": (
        At("checkpoint/begun"),
        At("checkpoint/shards-written", rank=2),
        At("checkpoint/manifest-written", times=2),
        At("iteration/refreshed", rank=1),
        At("checkpoint/renamed"),
        At("checkpoint/pointer-moved"),
        At("checkpoint/old-set-aside"),
        At("checkpoint/old-removed"),
    ),
}
# In a run that has been trained already.
AT_THE_END = (At("run/trained"), At("export/begun", rank=3), At("export/written", rank=0), At("export/published"))
OTHER_LAYOUTS = (
    (Layout(tp=2, pp=2), At("train/step", times=3)),
    (Layout(dp=2), At("rollouts/response", times=3, rank=1)),
    (Layout(pp=2), At("checkpoint/renamed")),
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("inputs")
    make_inputs(directory)
    return directory


@pytest.fixture(scope="module")
def uninterrupted(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[KillableRun, Outcome]:
    run = KillableRun(tmp_path_factory.mktemp("uninterrupted") / "a", inputs)
    outcome = run.finish()
    assert not every_example_once(outcome.history, STEPS, EXAMPLES)
    return run, outcome


@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_weights(
    inputs: Path, uninterrupted: tuple[KillableRun, Outcome], tmp_path: Path, chain: tuple[At, ...]
) -> None:
    run = KillableRun(tmp_path / "a", inputs)
    for at in chain:
        run.kill(at)
    assert not differences(run, run.finish(), *uninterrupted)


def test_a_run_that_is_killed_in_its_export_repeats_it(
    inputs: Path, uninterrupted: tuple[KillableRun, Outcome], tmp_path: Path
) -> None:
    run = KillableRun(tmp_path / "a", inputs)
    shutil.copytree(uninterrupted[0].directory, run.directory, dirs_exist_ok=True)
    for at in AT_THE_END:
        run.kill(at)
    assert not differences(run, run.finish(), *uninterrupted)


def test_a_run_goes_on_in_other_layouts(
    inputs: Path, uninterrupted: tuple[KillableRun, Outcome], tmp_path: Path
) -> None:
    run = KillableRun(tmp_path / "a", inputs)
    for layout, at in OTHER_LAYOUTS:
        run.kill(at, layout)
    outcome, expected = run.finish(Layout()), uninterrupted[1]
    assert not every_example_once(outcome.history, STEPS, EXAMPLES)
    assert not outcome.history.after_finish
    assert outcome.history.losses == pytest.approx(expected.history.losses, rel=1e-4)
    assert relative_distance(outcome.weights, expected.weights) < 1e-5
    assert relative_distance(outcome.exported, expected.exported) < 1e-5


def test_a_run_that_is_killed_among_replayed_pairs_goes_on(inputs: Path, tmp_path: Path) -> None:
    mixed = {"model.spin.replay_iterations": 1, "trainer.spin.max_epochs": 1}
    layout = Layout(tp=2)
    expected = KillableRun(tmp_path / "b", inputs, **mixed).finish(layout)
    run = KillableRun(tmp_path / "a", inputs, **mixed)
    # Before the second iteration's first checkpoint; with its own pairs on disk alone; with earlier ones scored, and
    # not written; with both.
    for at in (At("iteration/refreshed"), At("rollouts/part"), At("rollouts/scored"), At("train/step", times=2)):
        run.kill(at, layout)
    outcome = run.finish(layout)
    assert len(expected.history.losses) == 3 + 6
    assert outcome.history.losses == expected.history.losses and not outcome.history.after_finish
    for name, tensor in expected.weights.items():
        assert torch.equal(outcome.weights[name], tensor), name


def test_every_named_point_is_killed_at() -> None:
    named = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "reached":
                assert isinstance(node.args[0], ast.Constant), f"{path}:{node.lineno}: a point is named where it is"
                named.add(node.args[0].value)
    chains = (*CHAINS.values(), AT_THE_END, [at for _, at in OTHER_LAYOUTS])
    assert named == {at.point for chain in chains for at in chain}
