"""Pairs of earlier iterations, several responses to a prompt, a reference that stays: what is trained on, with whose
log-probabilities, and that a run with them goes on where it was."""

from __future__ import annotations

import shutil
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from noting import noted_run
from runs import finish, training_run
from selfplay import relative_distance

from nemo_spin.selfplay.pairs import Pair

TENSOR: dict[str, Any] = {"tp": 2, "model.tensor_model_parallel_size": 2}
PIPELINE: dict[str, Any] = {"pp": 2, "model.pipeline_model_parallel_size": 2}
# All pairs of an epoch in one step, so that what it is made on is what the iteration began with.
ONE_STEP = {"trainer.spin.max_epochs": 1, "model.global_batch_size": 96, "model.spin.replay_iterations": 1}
SEVERAL = {"model.spin.num_generations": 2}
# 24 pairs in the first iteration, 48 in the second: 3 and 6 steps.
MIXED = {"trainer.spin.max_epochs": 1, "model.spin.replay_iterations": 1}


def rows(run_dir: Path, *place: str) -> dict[tuple[int, int], dict[str, Any]]:
    """The rollouts in a directory by (index, sample)."""
    files = sorted((run_dir / "rollouts" / Path(*place)).glob("part-*.parquet"))
    return {(r["index"], r["sample"]): r for file in files for r in pq.read_table(file).to_pylist()}


def by_example(pairs: list[Pair]) -> dict[int, list[Pair]]:
    found = defaultdict(list)
    for pair in pairs:
        found[pair.example.index].append(pair)
    return found


@pytest.mark.parametrize("layout", [TENSOR, PIPELINE], ids=["tp2", "pp2"])
def test_pairs_of_the_iteration_before_are_scored_by_the_present_reference(
    workers: Any, inputs: tuple[str, str], tmp_path: Path, layout: dict[str, Any]
) -> None:
    run = workers.run(noted_run, *inputs, str(tmp_path), **ONE_STEP, **layout)[0]
    first, second = run["pairs"]
    assert len(first) == 24 and len(second) == 48
    made = [
        {index: tuple(row["rejected_ids"]) for (index, _), row in rows(tmp_path, f"iteration-00{i}").items()}
        for i in (0, 1)
    ]
    before = {pair.example.index: pair for pair in first}
    for index, pairs in by_example(second).items():
        assert Counter(pair.rejected_ids for pair in pairs) == Counter([made[0][index], made[1][index]])
        own = next(pair for pair in pairs if pair.rejected_ids == made[1][index])
        for pair in pairs:
            assert pair.ref_chosen_logps == pytest.approx(own.ref_chosen_logps, abs=2e-5)
            assert abs(pair.ref_chosen_logps - before[index].ref_chosen_logps) > 1e-4, "the policy has moved since"
    # A margin that is not 0 only makes the mean larger: those of any other reference would be seen.
    assert run["history"][1]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert not set(range(24)) - {index for iteration, index in run["requested"] if iteration == 1}
    assert len(run["requested"]) == 48, "what is replayed is not generated again"
    replayed = rows(tmp_path, "iteration-001", "of-iteration-000")
    assert {index: tuple(row["rejected_ids"]) for (index, _), row in replayed.items()} == made[0]


@pytest.mark.parametrize(
    "change", [{}, SEVERAL, {"model.spin.rollout_window": 16}], ids=["plain", "several", "windowed"]
)
def test_a_run_with_replay_goes_on_where_it_was(
    workers: Any, inputs: tuple[str, str], tmp_path: Path, change: dict[str, Any]
) -> None:
    options = MIXED | change | TENSOR
    one_go = finish(workers.run(training_run, *inputs, str(tmp_path / "one-go"), **options))
    steps = len(one_go["history"])
    first_of_second = steps // 3 + 1
    assert one_go["history"][first_of_second - 1]["loss"] == pytest.approx(0.693147, abs=1e-4)
    run_dir = tmp_path / "run"
    for after, resume in ((first_of_second, False), (3, True)):
        workers.run(training_run, *inputs, str(run_dir), interrupt_after=after, resume=resume, **options)
        # What it needs has to be in its checkpoint.
        shutil.rmtree(run_dir / "rollouts")
    end = finish(workers.run(training_run, *inputs, str(run_dir), resume=True, **options))
    assert end["history"] == one_go["history"][steps - len(end["history"]) :] and len(end["history"]) < steps - 3
    for key, tensor in one_go["weights"].items():
        assert torch.equal(end["weights"][key], tensor), key


def test_a_run_with_replay_goes_on_in_another_layout(workers: Any, inputs: tuple[str, str], tmp_path: Path) -> None:
    one_go = finish(workers.run(training_run, *inputs, str(tmp_path / "one-go"), **MIXED, **TENSOR))
    workers.run(training_run, *inputs, str(tmp_path / "run"), interrupt_after=5, **MIXED, **TENSOR)
    end = finish(workers.run(training_run, *inputs, str(tmp_path / "run"), resume=True, **MIXED, **PIPELINE))
    assert relative_distance(end["weights"], one_go["weights"]) < 1e-5


def resume_with(checkpoint: str, data: str, run_dir: str, **overrides: Any) -> str:
    from nemo_spin.errors import CheckpointError

    try:
        training_run(checkpoint, data, run_dir, resume=True, **overrides)
    except CheckpointError as error:
        return str(error)
    return ""


def test_what_is_to_be_replayed_has_to_be_in_the_checkpoint(
    workers: Any, inputs: tuple[str, str], tmp_path: Path
) -> None:
    none = {"trainer.spin.max_epochs": 1, "trainer.spin.save_interval": 0}
    workers.run(training_run, *inputs, str(tmp_path), interrupt_after=4, **none)
    says = workers.run(resume_with, *inputs, str(tmp_path), **none | {"model.spin.replay_iterations": 1})[0]
    assert says.startswith("The checkpoint lacks 24 responses of iteration 0") and says.endswith("or with 0.")


def test_what_is_to_be_replayed_has_to_be_of_the_same_examples(
    workers: Any, inputs: tuple[str, str], tmp_path: Path
) -> None:
    """Responses are known by the index of their example: among other data it is the index of another one."""
    checkpoint, data = inputs
    options = MIXED | {"trainer.spin.save_interval": 0}
    workers.run(training_run, checkpoint, data, str(tmp_path / "run"), interrupt_after=4, **options)
    other = tmp_path / "reversed.jsonl"
    other.write_text("".join(reversed(Path(data).read_text().splitlines(keepends=True))))
    says = workers.run(resume_with, checkpoint, str(other), str(tmp_path / "run"), **options)[0]
    assert "are to other training examples: resume with the same" in says and "\n" not in says


def test_several_responses_to_a_prompt_make_a_pair_each(workers: Any, inputs: tuple[str, str], tmp_path: Path) -> None:
    options = {"trainer.spin.max_epochs": 1, "model.global_batch_size": 12} | SEVERAL | TENSOR
    run = workers.run(noted_run, *inputs, str(tmp_path), **options)[0]
    made = rows(tmp_path, "iteration-000")
    assert set(made) == {(index, sample) for index in range(24) for sample in (0, 1)}
    assert sum(made[index, 0]["rejected_ids"] != made[index, 1]["rejected_ids"] for index in range(24)) > 12
    pairs = [pair for step in run["pairs"][:4] for pair in step]
    assert [len(step) for step in run["pairs"]] == [12] * 8
    for one, other in zip(pairs[::2], pairs[1::2], strict=True):
        index = one.example.index
        assert other.example.index == index, "they follow each other"
        assert [list(one.rejected_ids), list(other.rejected_ids)] == [made[index, s]["rejected_ids"] for s in (0, 1)]
        assert other.ref_rejected_logps == made[index, 1]["ref_rejected_logps"]
    assert run["history"][0]["loss"] == pytest.approx(0.693147, abs=1e-5)


@pytest.mark.parametrize(("selection", "choose"), [("best", max), ("worst", min)])
def test_the_best_or_the_worst_of_several_makes_the_pair(
    workers: Any, inputs: tuple[str, str], tmp_path: Path, selection: str, choose: Any
) -> None:
    options = ONE_STEP | SEVERAL | {"model.spin.rejected_selection": selection}
    run = workers.run(noted_run, *inputs, str(tmp_path), **options)[0]
    made = rows(tmp_path, "iteration-000")
    assert [len(step) for step in run["pairs"]] == [24, 48]
    for pair in run["pairs"][0]:
        logps = [made[pair.example.index, sample]["ref_rejected_logps"] for sample in (0, 1)]
        assert pair.ref_rejected_logps == choose(logps)


def test_a_reference_that_is_not_refreshed_stays_the_sft_model(
    workers: Any, inputs: tuple[str, str], tmp_path: Path
) -> None:
    fixed = {"model.spin.refresh_reference": False, "trainer.spin.max_epochs": 1} | TENSOR
    unmoved = {"model.optim.lr": 1e-12, "model.optim.sched.min_lr": 0, "model.optim.weight_decay": 0}
    expected = workers.run(noted_run, *inputs, str(tmp_path / "unmoved"), **fixed | unmoved)[0]
    run = workers.run(noted_run, *inputs, str(tmp_path / "fixed"), **fixed)[0]
    assert rows(tmp_path / "fixed", "iteration-001").keys() == rows(tmp_path / "unmoved", "iteration-001").keys()
    for step, as_expected in zip(run["pairs"], expected["pairs"], strict=True):
        for pair, same in zip(step, as_expected, strict=True):
            assert pair.rejected_ids == same.rejected_ids
            assert pair.ref_chosen_logps == pytest.approx(same.ref_chosen_logps, abs=1e-4)
    assert run["history"][3]["loss"] != pytest.approx(0.693147, abs=1e-3), "in the second iteration it has moved away"
    # Interrupted where the second iteration begins, with a reference that is not the policy.
    directory = str(tmp_path / "run")
    workers.run(training_run, *inputs, directory, interrupt_after=4, **fixed)
    end = workers.run(training_run, *inputs, directory, resume=True, **fixed)[0]
    assert [step["step"] for step in end["history"]] == [4, 5, 6]
    assert [step["loss"] for step in end["history"]] == [step["loss"] for step in run["history"][3:]]
