"""Runs through the trainer: what is on disk, and that an interrupted run ends like one that was not."""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from runs import finish, training_run
from selfplay import relative_distance


def test_the_run_is_what_it_was_configured_to_be(uninterrupted: dict[str, Any]) -> None:
    history = uninterrupted["history"]
    assert [h["step"] for h in history] == list(range(1, 13))
    assert [h["epoch"] for h in history] == [0, 0, 0, 1, 1, 1] * 2
    assert [history[i]["loss"] for i in (0, 6)] == pytest.approx([0.693147, 0.693147], abs=1e-4)
    counts = {"iteration": 2, "iteration_step": 0, "step": 12, "consumed_samples": 96}
    assert uninterrupted["progress"] == counts | {"skipped_steps": 0, "skipped_in_a_row": 0}


def test_rollouts_lie_on_disk_for_people(uninterrupted: dict[str, Any]) -> None:
    tables = [pq.read_table(uninterrupted["run_dir"] / "rollouts" / f"iteration-{i:03d}") for i in range(2)]
    for table in tables:
        assert table.column("index").to_pylist() == list(range(24))
        row = table.slice(3, 1).to_pylist()[0]
        assert row["rejected_length"] == len(row["rejected_ids"]) <= 8
        assert set(table.column("finish_reason").to_pylist()) <= {"stop", "length"}
        assert all(isinstance(row[name], str) for name in ("prompt", "chosen", "rejected"))
        assert row["ref_chosen_logps"] < 0
    assert tables[0].column("rejected_ids") != tables[1].column("rejected_ids")


def test_only_whole_checkpoints_of_iteration_ends_stay(uninterrupted: dict[str, Any]) -> None:
    directory = uninterrupted["run_dir"] / "checkpoints"
    kept = sorted(path.name for path in directory.iterdir())
    assert kept == ["iteration-001-step-0000006", "iteration-002-step-0000012", "latest"]


@pytest.mark.parametrize(
    ("interrupt_after", "resumed_from"),
    [(5, 4), (7, 6)],
    ids=["mid-iteration", "boundary"],
)
@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}], ids=["same-layout", "other-layout"])
def test_an_interrupted_run_ends_with_the_same_weights(
    workers: Any,
    inputs: tuple[str, str],
    uninterrupted: dict[str, Any],
    tmp_path: Path,
    interrupt_after: int,
    resumed_from: int,
    layout: dict[str, int],
) -> None:
    run_dir = str(tmp_path / "run")
    first = finish(workers.run(training_run, *inputs, run_dir, interrupt_after=interrupt_after, tp=2))
    assert first["history"] == uninterrupted["history"][:interrupt_after]
    parallel = {
        "model.tensor_model_parallel_size": layout.get("tp", 1),
        "model.pipeline_model_parallel_size": layout.get("pp", 1),
    }
    second = finish(workers.run(training_run, *inputs, run_dir, resume=True, **layout, **parallel))
    assert [h["step"] for h in second["history"]] == list(range(resumed_from + 1, 13))
    if layout == {"tp": 2}:
        assert second["history"] == uninterrupted["history"][resumed_from:]
        for key, tensor in uninterrupted["weights"].items():
            assert torch.equal(second["weights"][key], tensor), key
    else:
        losses = [h["loss"] for h in second["history"]]
        expected = [h["loss"] for h in uninterrupted["history"][resumed_from:]]
        assert losses == pytest.approx(expected, rel=1e-4)
        assert relative_distance(second["weights"], uninterrupted["weights"]) < 1e-5


def test_a_windowed_run_keeps_its_reference_over_an_interruption(
    workers: Any, inputs: tuple[str, str], uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    windowed = {"model.spin.rollout_window": 8, "trainer.spin.save_interval": 1, "trainer.spin.max_epochs": 1}
    whole = {"trainer.spin.max_epochs": 1}
    one_go = finish(workers.run(training_run, *inputs, str(tmp_path / "whole"), **whole, tp=2))
    # Interrupted after a checkpoint at which a window is still to be rolled out by a reference that is not the policy.
    workers.run(training_run, *inputs, str(tmp_path / "run"), interrupt_after=2, **windowed, tp=2)
    resumed = finish(workers.run(training_run, *inputs, str(tmp_path / "run"), resume=True, **windowed, tp=2))
    assert [h["loss"] for h in resumed["history"]] == pytest.approx(
        [h["loss"] for h in one_go["history"][1:]], rel=1e-5
    )
    assert relative_distance(resumed["weights"], one_go["weights"]) < 1e-6


def resume_with_another_batch_size(checkpoint: str, data: str, run_dir: str) -> str:
    from nemo_spin.errors import CheckpointError

    try:
        training_run(checkpoint, data, run_dir, resume=True, **{"model.global_batch_size": 4})
    except CheckpointError as error:
        return str(error)
    return ""


def test_a_run_is_not_resumed_as_another_one(workers: Any, inputs: tuple[str, str], tmp_path: Path) -> None:
    workers.run(training_run, *inputs, str(tmp_path), interrupt_after=3)
    message = workers.run(resume_with_another_batch_size, *inputs, str(tmp_path))[0]
    assert "model.global_batch_size = 8" in message
    assert "\n" not in message


@pytest.mark.parametrize("asked", [1, 4, 7], ids=["in the rollouts", "in mid-iteration", "at the boundary"])
def test_a_run_that_is_stopped_saves_and_the_next_one_goes_on(
    workers: Any, inputs: tuple[str, str], uninterrupted: dict[str, Any], tmp_path: Path, asked: int
) -> None:
    # in each iteration it is asked once for the rollouts and once for each of six steps
    first = finish(workers.run(training_run, *inputs, str(tmp_path), stop_after=asked, tp=2))
    assert not first["finished"] and len(first["history"]) == asked - 1
    second = finish(workers.run(training_run, *inputs, str(tmp_path), resume=True, tp=2))
    assert second["finished"]
    assert first["history"] + second["history"] == uninterrupted["history"]
    for key, tensor in uninterrupted["weights"].items():
        assert torch.equal(second["weights"][key], tensor), key


def metrics_of(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def digests_of(checkpoint: Path) -> dict[str, Any]:
    """Of tensors and plain values, not of what describes the one writing."""
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    return {name: digest for name, digest in files.items() if name.endswith((".distcp", ".pt"))}


def test_saving_changes_nothing_whether_training_waits_for_it_or_not(
    workers: Any, inputs: tuple[str, str], uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    changes = {"trainer.spin.save_interval": 1, "exp_manager.checkpoint_callback_params.async_save": False}
    waiting = finish(workers.run(training_run, *inputs, str(tmp_path), **changes, tp=2))
    assert waiting["history"] == uninterrupted["history"]
    for key, tensor in uninterrupted["weights"].items():
        assert torch.equal(waiting["weights"][key], tensor), key
    for name in ("iteration-001-step-0000006", "iteration-002-step-0000012"):
        digests = [digests_of(run_dir / "checkpoints" / name) for run_dir in (tmp_path, uninterrupted["run_dir"])]
        assert digests[0] == digests[1] and len(digests[0]) >= 2


def run_while_the_disk_is_full(checkpoint: str, data: str, run_dir: str) -> dict[str, Any]:
    """There is room from step 5 on."""
    from nemo_spin.checkpoint.manager import TrainingCheckpoints

    make_way, tried = TrainingCheckpoints._make_way, []

    def make_way_from_step_5(self: Any, unfinished: Path, state: Any) -> None:
        tried.append(state.progress.step)
        if state.progress.step < 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        make_way(self, unfinished, state)

    TrainingCheckpoints._make_way = make_way_from_step_5
    try:
        return training_run(checkpoint, data, run_dir) | {"tried": tried}
    finally:
        TrainingCheckpoints._make_way = make_way


def test_a_full_disk_does_not_end_a_run(
    workers: Any, inputs: tuple[str, str], uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    result = finish(workers.run(run_while_the_disk_is_full, *inputs, str(tmp_path), tp=2))
    # 2 and 4 are due; 3 is one step after a failure, 5 would be two after the second, but 4 failed as well
    assert result["tried"] == [2, 3, 4, 6, 8, 10, 12]
    assert result["finished"] and result["history"] == uninterrupted["history"]
    for key, tensor in uninterrupted["weights"].items():
        assert torch.equal(result["weights"][key], tensor), key


def test_the_best_checkpoints_stay(workers: Any, inputs: tuple[str, str], tmp_path: Path) -> None:
    changes = {
        "trainer.spin.save_interval": 1,
        "trainer.spin.val_check_interval": 1,
        "trainer.spin.max_iterations": 1,
        "exp_manager.checkpoint_callback_params.save_top_k": 2,
        # the loss falls: the largest are the oldest, which would not stay by themselves
        "exp_manager.checkpoint_callback_params.mode": "max",
        "model.optim.lr": 1e-3,
        "model.spin.ref_policy_kl_penalty": 0.5,
    }
    workers.run(training_run, *inputs, str(tmp_path), **changes)
    losses = {line["step"]: line["val_loss"] for line in metrics_of(tmp_path, "validation")}
    within = sorted((step for step in losses if 0 < step < 6), key=losses.get, reverse=True)
    assert set(within[:2]) != {4, 5}
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()} - {"latest"}
    assert names == {f"iteration-000-step-{step:07d}" for step in within[:2]} | {"iteration-001-step-0000006"}


def test_held_out_rollouts_are_validated_as_they_would_be_trained(
    workers: Any, inputs: tuple[str, str], tmp_path: Path
) -> None:
    held_out = {
        "model.spin.held_out_rollouts": 10,
        "trainer.spin.val_check_interval": 1,
        "model.data.validation_ds.file_path": inputs[1],
    }
    one_go = finish(workers.run(training_run, *inputs, str(tmp_path / "a"), **held_out, pp=2, **{
        "model.pipeline_model_parallel_size": 2,
    }))  # fmt: skip
    lines = metrics_of(tmp_path / "a", "validation")
    assert [line["step"] for line in lines] == list(range(13))
    assert "val/loss" not in lines[0], "there was no opponent yet"
    for line in lines[1:]:
        assert line["val/rewards/margins"] == pytest.approx(line["val/rewards/chosen"] - line["val/rewards/rejected"])
        # -log sigmoid is convex
        assert line["val/loss"] >= math.log1p(math.exp(-line["val/rewards/margins"])) - 1e-6
    files = sorted((tmp_path / "a" / "rollouts" / "held_out").rglob("*.parquet"))
    tables = [pq.read_table(path).to_pylist() for path in files]
    assert [len(rows) for rows in tables] == [10, 10]
    # The same prompts as in training, because the test validates on its training data; not the same draws.
    trained = pq.read_table(tmp_path / "a" / "rollouts" / "iteration-000").to_pylist()
    assert [row["prompt_ids"] for row in tables[0]] == [row["prompt_ids"] for row in trained[:10]]
    assert [row["rejected_ids"] for row in tables[0]] != [row["rejected_ids"] for row in trained[:10]]
    # Interrupted, they are not drawn again, and an opponent that has been left behind would give other log-probs.
    workers.run(training_run, *inputs, str(tmp_path / "b"), interrupt_after=3, **held_out)
    finish(workers.run(training_run, *inputs, str(tmp_path / "b"), resume=True, **held_out))
    resumed = {line["step"]: line["val/loss"] for line in metrics_of(tmp_path / "b", "validation") if line["step"] > 0}
    assert resumed == pytest.approx({line["step"]: line["val/loss"] for line in lines[1:]}, rel=1e-4)
    assert one_go["finished"]


def data_with_answers(directory: Path) -> str:
    """Records of the SPIN release, for a tokenizer that is given a chat template."""
    path = directory / "pairs.jsonl"
    turns = [({"role": "user", "content": f"{i} plus 2"}, f"makes {i + 2}", f"makes {i}") for i in range(8)]
    rows = [
        {name: [user, {"role": "assistant", "content": text}] for name, text in (("real", human), ("generated", other))}
        for user, human, other in turns
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def answers_from_the_data(checkpoint: str, data: str, run_dir: str) -> dict[str, Any]:
    from nemo_spin.model_io.tokenizers import NeMoTokenizer

    def render(self: Any, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        return " ".join(message["content"] for message in messages)

    theirs, NeMoTokenizer.render_chat = NeMoTokenizer.render_chat, render
    try:
        return training_run(checkpoint, data, run_dir, **{
            "model.spin.first_rollouts_from_data": True, "model.data.train_ds.shuffle": False,
        })  # fmt: skip
    finally:
        NeMoTokenizer.render_chat = theirs


def test_the_first_opponent_may_be_in_the_data(workers: Any, inputs: tuple[str, str], tmp_path: Path) -> None:
    data = data_with_answers(tmp_path)
    (result,) = workers.run(answers_from_the_data, inputs[0], data, str(tmp_path / "run"))
    given, generated = (
        pq.read_table(tmp_path / "run" / "rollouts" / f"iteration-{i:03d}").to_pylist() for i in range(2)
    )
    assert [row["rejected"].strip() for row in given] == [f"makes {i}" for i in range(8)]
    assert [row["finish_reason"] for row in given] == ["stop"] * 8
    assert [row["rejected_ids"] for row in generated] != [row["rejected_ids"] for row in given]
    assert result["history"][0]["loss"] == pytest.approx(math.log(2), abs=1e-4)


def test_the_optimizer_can_be_carried_on(workers: Any, inputs: tuple[str, str], tmp_path: Path) -> None:
    carried = {"model.spin.reset_optimizer_each_iteration": False, "model.optim.lr": 1e-3}
    one_go = finish(workers.run(training_run, *inputs, str(tmp_path / "a"), **carried))
    workers.run(training_run, *inputs, str(tmp_path / "b"), interrupt_after=7, **carried)
    resumed = finish(workers.run(training_run, *inputs, str(tmp_path / "b"), resume=True, **carried))
    assert resumed["history"] == one_go["history"][6:]
    for key, tensor in one_go["weights"].items():
        assert torch.equal(resumed["weights"][key], tensor), key


def a_run_whose_rollouts_are_wrong(checkpoint: str, data: str, run_dir: str) -> str:
    import dataclasses

    from nemo_spin.errors import UserError
    from nemo_spin.selfplay.megatron_policy import MegatronPolicy

    right = MegatronPolicy.roll_out

    def wrong(*args: Any, **hooks: Any) -> list:
        # As if the stop token were missing from the mask of chosen and rejected alike: the margin hardly shows it.
        return [
            dataclasses.replace(
                rollout,
                ref_chosen_logps=rollout.ref_chosen_logps + 0.3,
                ref_rejected_logps=rollout.ref_rejected_logps + 0.3,
            )
            for rollout in right(*args, **hooks)
        ]

    MegatronPolicy.roll_out = wrong
    try:
        training_run(checkpoint, data, run_dir)
    except UserError as error:
        return str(error)
    finally:
        MegatronPolicy.roll_out = right
    return ""


def test_a_first_step_that_is_not_ln_2_stops_the_run(workers: Any, inputs: tuple[str, str], tmp_path: Path) -> None:
    (message,) = workers.run(a_run_whose_rollouts_are_wrong, *inputs, str(tmp_path))
    assert "has to be ln 2" in message
