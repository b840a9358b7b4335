"""Runs that look for their equilibrium: figures of every iteration, in any layout, and an end that is found again."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from runs import training_run

HELD_OUT = {"model.spin.held_out_rollouts": 10, "model.data.validation_ds.file_path": "the training data, as tests do"}
SHORT = {"trainer.spin.max_epochs": 1}
LIMIT = "trainer.spin.stop_at_equilibrium."


def lines_of(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def figures(line: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in line.items() if name.startswith("equilibrium/")}


def test_every_iteration_is_measured_alike_in_every_layout(
    workers: Any, inputs: tuple[str, str], tmp_path: Path
) -> None:
    found = {}
    for name, tp, pp in (("one", 1, 1), ("four", 2, 2)):
        layout = {"model.tensor_model_parallel_size": tp, "model.pipeline_model_parallel_size": pp}
        workers.run(training_run, *inputs, str(tmp_path / name), **HELD_OUT, **SHORT, **layout, tp=tp, pp=pp)
        lines = lines_of(tmp_path / name, "equilibrium")
        assert [(line["iteration"], line["step"]) for line in lines] == [(0, 0), (1, 3)]
        found[name] = list(map(figures, lines))
    first, second = found["one"]
    always = {f"equilibrium/{name}" for name in ("logps_gap", "logps_gap_error", "exact_match", "token_overlap")}
    assert set(first) == always and set(second) == always | {"equilibrium/accuracy"}
    validated = [line for line in lines_of(tmp_path / "one", "validation") if line["step"] == 3]
    assert second["equilibrium/accuracy"] == validated[-1]["val/rewards/accuracies"]
    for one, four in zip(found["one"], found["four"], strict=True):
        assert four == pytest.approx(one, rel=1e-3, abs=1e-4)


def test_without_held_out_rollouts_those_for_training_are_measured_once(
    workers: Any, inputs: tuple[str, str], tmp_path: Path
) -> None:
    import pyarrow.parquet as pq

    workers.run(training_run, *inputs, str(tmp_path), interrupt_after=9)
    workers.run(training_run, *inputs, str(tmp_path), resume=True)
    lines = lines_of(tmp_path, "equilibrium")
    # in the middle of an iteration that is measured already
    assert [line["step"] for line in lines_of(tmp_path, "resume")] == [8]
    assert [line["iteration"] for line in lines] == [0, 1]
    for line in lines:
        rows = pq.read_table(tmp_path / "rollouts" / f"iteration-{line['iteration']:03d}").to_pylist()
        tokens = {kind: sum(row[f"{kind}_length"] for row in rows) for kind in ("chosen", "rejected")}
        logps = {kind: math.fsum(row[f"ref_{kind}_logps"] for row in rows) / tokens[kind] for kind in tokens}
        assert line["equilibrium/logps_gap"] == pytest.approx(logps["rejected"] - logps["chosen"], rel=1e-6)
        assert "equilibrium/accuracy" not in line and "equilibrium/reached" not in line


def said_in(run_dir: Path) -> list[str]:
    return [line["reason"] for line in lines_of(run_dir, "end")]


def test_a_run_ends_at_its_equilibrium_and_so_does_one_that_goes_on_from_there(
    workers: Any, inputs: tuple[str, str], tmp_path: Path
) -> None:
    # Of the accuracy nothing is known before the first iteration, which therefore is trained in any case.
    near = {f"{LIMIT}accuracy": 1.0, f"{LIMIT}logps_gap": 100.0}
    ended = workers.run(training_run, *inputs, str(tmp_path / "a"), **HELD_OUT, **SHORT, **near, tp=2)[0]
    assert ended["finished"] and [h["step"] for h in ended["history"]] == [1, 2, 3]
    assert ended["progress"]["iteration"] == 1
    assert [line["equilibrium/reached"] for line in lines_of(tmp_path / "a", "equilibrium")] == [0.0, 1.0]
    assert not (tmp_path / "a" / "rollouts" / "iteration-001").exists()
    (reason,) = said_in(tmp_path / "a")
    measured = lines_of(tmp_path / "a", "equilibrium")[1]
    assert reason == (
        f"At equilibrium before iteration 1: accuracy {measured['equilibrium/accuracy']:.3f} (at most 1), logps_gap "
        f"{measured['equilibrium/logps_gap']:+.4f} nats per token (at most 100 from 0)."
    )
    again = workers.run(training_run, *inputs, str(tmp_path / "a"), **HELD_OUT, **SHORT, **near, resume=True, tp=2)[0]
    assert again["finished"] and again["history"] == []
    assert said_in(tmp_path / "a") == [reason, reason]
    # with a limit that is not met it goes on
    far = near | {f"{LIMIT}exact_match": 1.0}
    more = workers.run(training_run, *inputs, str(tmp_path / "a"), **HELD_OUT, **SHORT, **far, resume=True, tp=2)[0]
    assert more["finished"] and [h["step"] for h in more["history"]] == [4, 5, 6]
    assert "reason" not in lines_of(tmp_path / "a", "end")[-1]


def test_a_run_that_was_stopped_in_the_rollouts_decides_as_one_that_was_not(
    workers: Any, inputs: tuple[str, str], tmp_path: Path
) -> None:
    near = {f"{LIMIT}accuracy": 1.0}
    ended = workers.run(training_run, *inputs, str(tmp_path / "a"), **HELD_OUT, **SHORT, **near)[0]
    # asked after the held-out rollouts, the rollouts and each of three steps, and then after the held-out rollouts
    stopped = workers.run(training_run, *inputs, str(tmp_path / "b"), **HELD_OUT, **SHORT, **near, stop_after=6)[0]
    assert not stopped["finished"] and stopped["progress"] == ended["progress"]
    (written,) = [path for path in (tmp_path / "b" / "checkpoints").glob("iteration-*") if path.name.endswith("-2")]
    assert list((written / "held_out").iterdir())
    resumed = workers.run(training_run, *inputs, str(tmp_path / "b"), **HELD_OUT, **SHORT, **near, resume=True)[0]
    assert resumed["finished"] and resumed["history"] == []
    assert said_in(tmp_path / "b") == said_in(tmp_path / "a")
