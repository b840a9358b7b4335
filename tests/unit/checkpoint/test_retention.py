"""Which checkpoints stay, which states are believed, and when one that could not be written is tried again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_spin.checkpoint.background import Retries
from nemo_spin.checkpoint.manifest import digest_of, write_manifest
from nemo_spin.checkpoint.retention import Retention
from nemo_spin.checkpoint.run_state import RunState, Stored, read_state, write_state
from nemo_spin.errors import CheckpointError
from nemo_spin.runtime.progress import Progress


def stored(step: int, loss: float | None = None, serial: int = 0, name: str = "", **changes: Any) -> Stored:
    metrics = {} if loss is None else {"val_loss": loss}
    values = {"settings": {}, "with_reference": False, "keep": False, "ref_id": ""} | changes
    return Stored(Path(name or str(step)), Progress(0, step, step, step), metrics=metrics, serial=serial, **values)


@pytest.mark.parametrize(
    ("top_k", "mode", "removed"),
    [(0, "min", {"1", "2", "3", "4"}), (2, "min", {"1", "4"}), (2, "max", {"2", "3"}), (-1, "min", set())],
)
def test_the_newest_the_kept_and_the_best_stay(top_k: int, mode: str, removed: set[str]) -> None:
    there = [stored(1, 0.9), stored(2, 0.1), stored(3, 0.2), stored(4, 0.8), stored(5), stored(6, keep=True)]
    assert set(map(str, Retention("val_loss", mode, top_k).superfluous(there, Path("5")))) == removed


def test_of_two_at_the_same_place_the_later_one_stays() -> None:
    there = [stored(6, keep=True, serial=3, name="6-2"), stored(6, keep=True, serial=2, name="6"), stored(3, keep=True)]
    assert Retention().superfluous(there, Path("6-2")) == [Path("6")]


def test_a_metric_that_is_no_number_is_never_best() -> None:
    ranked = Retention(top_k=1).rank([stored(1, float("nan")), stored(2, 0.5), stored(3)])
    assert [one.path for one in ranked] == [Path("2")]


def test_retries_wait_longer_and_longer() -> None:
    retries = Retries()
    assert not retries.is_failing and not retries.is_due(10)
    tried, step = [], 100
    retries.failed(step)
    while len(tried) < 9:
        step += 1
        if retries.is_due(step):
            tried.append(step - 100)
            retries.failed(step)
    assert tried == [1, 3, 7, 15, 31, 63, 127, 191, 255]
    retries.succeeded()
    assert not retries.is_failing and retries.failed(500) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"progress": {"iteration": 0, "iteration_step": 1, "step": float("inf"), "consumed_samples": 1}},
        {"metrics": {"val_loss": "low"}},
        {"serial": "1"},
        {"keep": None},
        {"identity": []},
        {"format": 3},
        {"progress": {}},
    ],
    ids=str,
)
def test_a_state_that_no_run_writes_is_refused_in_a_sentence(tmp_path: Path, change: dict[str, Any]) -> None:
    state = RunState(Progress(0, 1, 1, 8), {"model.seed": 7}, {"val_loss": 0.5})
    write_state(tmp_path, state, with_reference=False, keep=True, serial=1)
    write_manifest(tmp_path, {"state.json": digest_of(tmp_path / "state.json")})
    assert read_state(tmp_path).metrics == {"val_loss": 0.5}
    content = json.loads((tmp_path / "state.json").read_text()) | change
    (tmp_path / "state.json").write_text(json.dumps(content))
    write_manifest(tmp_path, {"state.json": digest_of(tmp_path / "state.json")})
    with pytest.raises(CheckpointError, match=r"^state\.json (is damaged|has format 3)"):
        read_state(tmp_path)
