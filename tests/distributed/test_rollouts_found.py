"""A run that ended among its rollouts: what was finished is not made again, and the end is the same."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from noting import noted_run, parts_in
from runs import finish
from selfplay import relative_distance

ALL = set(range(24))
SHORT = {"trainer.spin.max_epochs": 1}
TENSOR: dict[str, Any] = {"tp": 2, "model.tensor_model_parallel_size": 2}
PIPELINE: dict[str, Any] = {"pp": 2, "model.pipeline_model_parallel_size": 2}
ONE_ITERATION = SHORT | {
    "trainer.spin.max_iterations": 1,
    "model.optim.lr": 1e-3,
    "model.spin.ref_policy_kl_penalty": 0.5,
}


@pytest.fixture(scope="module")
def in_one_go(workers: Any, inputs: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return finish(workers.run(noted_run, *inputs, str(tmp_path_factory.mktemp("one-go")), **SHORT, **TENSOR))


def of_all_replicas(lives: list[tuple[list[dict[str, Any]], int]], name: str) -> list[tuple[int, int]]:
    """What was noted in all lives of a run: each is a list by rank, and the ranks of a replica, which note the same."""
    return [item for ranks, step in lives for rank in ranks[::step] for item in rank[name]]


def test_killed_in_mid_rollout_before_any_checkpoint_and_at_a_boundary(
    workers: Any, inputs: tuple[str, str], in_one_go: dict[str, Any], tmp_path: Path
) -> None:
    run_dir = str(tmp_path / "run")
    # In the second chunk of the first iteration; nothing has been saved.
    first = workers.run(noted_run, *inputs, run_dir, fail_after=11, **SHORT, **TENSOR)
    assert len(parts_in(run_dir)) == 1 and not (tmp_path / "run" / "checkpoints").exists()
    # In the second chunk of the second iteration, after 13 responses that the first life has not finished.
    second = workers.run(noted_run, *inputs, run_dir, fail_after=13 + 11, **SHORT, **TENSOR)
    third = workers.run(noted_run, *inputs, run_dir, resume=True, **SHORT, **TENSOR)
    finished = of_all_replicas([(first, 2), (second, 2), (third, 2)], "finished")
    assert len(finished) == len(set(finished)) == 48, "each response of two iterations was made once"
    for earlier, later in itertools.combinations((first, second, third), 2):
        assert not set(earlier[0]["finished"]) & set(later[0]["requested"])
    end = finish(third)
    assert second[0]["history"] + end["history"] == in_one_go["history"]
    assert second[0]["trained"] + end["trained"] == in_one_go["trained"]
    for epoch in (in_one_go["trained"][:3], in_one_go["trained"][3:]):
        assert sorted(index for step in epoch for index in step) == sorted(ALL)
    for key, tensor in in_one_go["weights"].items():
        assert torch.equal(end["weights"][key], tensor), key
    assert not list((tmp_path / "run" / "rollouts").rglob("journal-*"))


def test_another_layout_takes_what_there_is_and_makes_what_is_damaged(
    workers: Any, inputs: tuple[str, str], in_one_go: dict[str, Any], tmp_path: Path
) -> None:
    run_dir = str(tmp_path / "run")
    # Chunks of two replicas are twice as large: both fail in the first one.
    first = workers.run(noted_run, *inputs, run_dir, fail_after=5, **SHORT, dp=2)
    second = workers.run(noted_run, *inputs, run_dir, fail_after=9, **SHORT, **PIPELINE)
    done = {index for _, index in of_all_replicas([(first, 1), (second, 2)], "finished")}
    assert len(done) == 2 * 5 + 9
    (damaged, *_) = parts_in(run_dir)
    lost = set(pq.read_table(damaged).column("index").to_pylist())
    damaged.write_bytes(damaged.read_bytes()[:-20])
    third = workers.run(noted_run, *inputs, run_dir, **SHORT, **PIPELINE)
    assert {index for iteration, index in third[0]["requested"] if iteration == 0} == ALL - done | lost
    assert any("files ignored: 1 damaged" in line for line in third[0]["said"])
    end = finish(third)
    losses = [h["loss"] for h in in_one_go["history"]]
    assert [h["loss"] for h in end["history"]] == pytest.approx(losses, rel=1e-4)
    assert relative_distance(end["weights"], in_one_go["weights"]) < 1e-5


def test_what_another_reference_has_made_is_not_used(
    workers: Any, inputs: tuple[str, str], in_one_go: dict[str, Any], tmp_path: Path
) -> None:
    run_dir = str(tmp_path / "run")
    # The reference of the second iteration is another one when the first is trained with another learning rate.
    other = SHORT | {"model.optim.lr": [2e-3, 5e-4]}
    workers.run(noted_run, *inputs, run_dir, fail_after=24 + 11, **other, **TENSOR)
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        path.rename(tmp_path / path.name)
    again = workers.run(noted_run, *inputs, run_dir, **SHORT, **TENSOR)
    assert [iteration for iteration, _ in again[0]["requested"]] == [1] * 24, "that of the first one is the same"
    assert any("of another reference or other settings" in line for line in again[0]["said"])
    assert again[0]["history"] == in_one_go["history"]


def test_generation_leaves_off_where_it_is(
    workers: Any, inputs: tuple[str, str], in_one_go: dict[str, Any], tmp_path: Path
) -> None:
    run_dir = str(tmp_path / "run")
    held_out = ONE_ITERATION | {
        "model.spin.held_out_rollouts": 10,
        "model.data.validation_ds.file_path": inputs[1],
    }
    # First among the held-out rollouts, then among those for training, where one replica is further than the other.
    noted: list[tuple[int, int]] = []
    for life, leave_off_after in enumerate((3, 9, None)):
        ranks = workers.run(
            noted_run, *inputs, run_dir, leave_off_after=leave_off_after, resume=life > 0, **held_out, dp=2
        )
        noted += of_all_replicas([(ranks, 1)], "finished")
        assert len(ranks[0]["history"]) == (3 if life == 2 else 0)
    assert len(noted) == len(set(noted)) == 24 + 10
    losses = [h["loss"] for h in ranks[0]["history"]]
    assert losses == pytest.approx([h["loss"] for h in in_one_go["history"][:3]], rel=1e-4)


def test_a_full_disk_does_not_end_the_rollouts(
    workers: Any, inputs: tuple[str, str], in_one_go: dict[str, Any], tmp_path: Path
) -> None:
    run_dir = str(tmp_path / "run")
    # Three chunks, and again when the first checkpoint is due, which cannot be without them.
    saving = {"trainer.spin.save_interval": 1}
    (result,) = workers.run(noted_run, *inputs, run_dir, parts_without_room=4, **ONE_ITERATION, **saving)
    signs = ("cannot be written", "could not be", " again")
    told = [line for line in result["said"] if any(sign in line.replace("against", "") for sign in signs)]
    assert "rollouts cannot be written" in told[0] and "No space left on device" in told[0]
    assert "iteration-000-step-0000001 could not be written (No space left on device)" in told[1]
    assert "Rollouts are written to" in told[2] and "the disk takes checkpoints again" in told[3] and len(told) == 4
    rows = [index for path in parts_in(run_dir) for index in pq.read_table(path).column("index").to_pylist()]
    assert sorted(rows) == sorted(ALL)
    losses = [h["loss"] for h in result["history"]]
    assert losses == pytest.approx([h["loss"] for h in in_one_go["history"][:3]], rel=1e-4)
