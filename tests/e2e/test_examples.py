"""The examples as they stand: SFT from scratch, whose checkpoint the commands read, and the quick start as a whole."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=1800
    )


def test_sft_from_scratch_makes_a_checkpoint_that_can_be_scored_with(tmp_path: Path) -> None:
    for name, first in {"train": 0, "validation": 60}.items():
        records = [
            {"input": f"{i} plus {i + 3}", "output": f"makes {2 * i + 3} in all"} for i in range(first, first + 60)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    made = run(
        str(REPO / "examples" / "sft_from_scratch.py"),
        *("--train", "train.jsonl", "--validation", "validation.jsonl", "--output", "sft.nemo"),
        *("--layers", "1", "--hidden-size", "32", "--epochs", "1", "--vocab-size", "40", "--context", "64"),
        cwd=tmp_path,
    )
    assert made.returncode == 0, made.stderr
    nll = float(re.search(r"after epoch 0: validation NLL (\S+) nats per token", made.stdout)[1])

    scored = run(
        *("-m", "nemo_spin", "score", "--checkpoint", "sft.nemo"),
        *("--data", "validation.jsonl", "--output", "scores.jsonl"),
        cwd=tmp_path,
    )
    assert scored.returncode == 0, scored.stderr
    scores = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert len(scores) == 60
    tokens = sum(score["num_tokens"] for score in scores)
    assert -sum(score["logp"] for score in scores) / tokens == pytest.approx(nll, abs=1e-4)


@pytest.mark.last
@pytest.mark.skipif(os.environ.get("NEMO_SPIN_SKIP_SLOW") == "1", reason="NEMO_SPIN_SKIP_SLOW is set")
def test_the_quick_start_runs_as_it_stands(tmp_path: Path) -> None:
    done = run(str(REPO / "examples" / "quickstart" / "run.py"), "--output", "quickstart", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    directory = tmp_path / "quickstart"
    rows = json.loads((directory / "figures.json").read_text())
    names = ["SFT", *(f"SPIN, iteration {i}" for i in range(3)), "further SFT, lr 1e-04", "further SFT, lr 3e-05"]
    assert [row["name"] for row in rows] == names
    table = [line for line in done.stdout.splitlines() if line.startswith(("SFT ", "SPIN, ", "further SFT, "))]
    assert [re.split(r"\s{2,}", line)[1] for line in table] == [f"{row['accuracy']:.1%}" for row in rows]
    # what the README says of SPIN on this task
    assert rows[3]["accuracy"] > rows[0]["accuracy"] + 0.1

    nemo = directory / "spin" / "checkpoints" / "megatron_gpt_spin_tiny.nemo"
    assert nemo.is_file() and str(Path("quickstart") / nemo.relative_to(directory)) in done.stdout
    assert "<h1>SPIN run: " in (directory / "spin" / "report.html").read_text()
