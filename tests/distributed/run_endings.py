"""Whether a run that was interrupted has ended as one that was not."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import torch
from killable import EXAMPLES, STEPS, KillableRun, Outcome
from run_notes import every_example_once
from torch import Tensor

from nemo_spin.reporting.page.history import read_history


def differences(run: KillableRun, outcome: Outcome, peaceful: KillableRun, expected: Outcome) -> list[str]:
    """Sentences: where `run` has not ended, bit by bit and file by file, as `peaceful`; none if all is well."""
    history = outcome.history
    found = every_example_once(history, STEPS, EXAMPLES)
    found += [
        f"step {step['step']} of start {step['start']} has the loss {step['loss']}"
        for step in history.made
        if step["loss"] != expected.history.steps[step["step"]]["loss"]
    ]
    logged = read_history(run.run_dir / "metrics.jsonl").series("loss")
    if logged.values != expected.history.losses:
        found.append(f"metrics.jsonl has the losses {logged.values}")
    found += [f"the response to {sample} was there and was generated again" for sample in history.after_finish]
    found += [f"weights: {name}" for name in _unequal(outcome.weights, expected.weights)]
    found += [f"exported weights: {name}" for name in _unequal(outcome.exported, expected.exported)]
    ours, theirs = _files(run.run_dir), _files(peaceful.run_dir)
    found += [f"{name} was left behind" for name in sorted(ours - theirs)]
    found += [f"{name} is missing" for name in sorted(theirs - ours)]
    if _rollouts(run.run_dir) != _rollouts(peaceful.run_dir):
        found.append("the rollouts on disk are others")
    return found


def _unequal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    if ours.keys() != theirs.keys():
        return sorted(ours.keys() ^ theirs.keys())
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


def _files(directory: Path) -> set[str]:
    """Paths below the directory; but rollouts may be in more files after a restart."""
    names = {str(path.relative_to(directory)) for path in directory.rglob("*")}
    return {name for name in names if not (name.startswith("rollouts/") and name.endswith(".parquet"))}


def _rollouts(directory: Path) -> list[tuple[str, list[dict]]]:
    rows: dict[str, list[dict]] = {}
    for path in sorted(directory.glob("rollouts/**/*.parquet")):
        rows.setdefault(str(path.parent.relative_to(directory)), []).extend(pq.ParquetFile(path).read().to_pylist())
    return sorted((name, sorted(of_one, key=lambda row: row["index"])) for name, of_one in rows.items())
