"""Self-play in a language with a known optimum comes to it and stays there; and the study runs as it stands."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
STUDY = REPO / "examples" / "study"

# A process of its own: megatron-core's process groups are not for sharing with other tests.
PLAY = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from pathlib import Path
import toy_language
from experiments import Job
job = Job("language", "language", sys.argv[3], 1, int(sys.argv[4]), tuple(sys.argv[5:]))
rows = list(toy_language.run(job, Path(sys.argv[2]), {}, sft_steps=200))
print(json.dumps([[iteration, figures] for iteration, _, figures in rows]))
"""


def play(directory: Path, shape: str, *overrides: str, examples: int = 4608) -> list[tuple[int, dict[str, float]]]:
    """The figures of the model that the run starts from, iteration -1, and after each iteration."""
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", PLAY, str(STUDY), str(directory), shape, str(examples), *overrides],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return [tuple(row) for row in json.loads(done.stdout.splitlines()[-1])]


def test_self_play_comes_to_the_data_as_the_theorem_says_and_ends_there(tmp_path: Path) -> None:
    rows = play(
        tmp_path / "far",
        "far",
        "model.spin.ref_policy_kl_penalty=2",
        "trainer.spin.max_iterations=8",
        "trainer.spin.stop_at_equilibrium.accuracy=0.56",
    )
    iterations, figures = zip(*rows, strict=True)
    distances = [row["kl"] for row in figures]
    assert distances[0] > 1.0
    # half of the way in log-probabilities, which an iteration does not quite reach
    assert 0.8 < figures[1]["kl_within"] / figures[1]["aim"] < 1.5
    assert distances[:4] == sorted(distances[:4], reverse=True)
    assert min(distances) < distances[0] / 20
    assert min(distances) < 6 * figures[0]["floor"]
    # where the two kinds of responses cannot be told apart, the run ends by itself
    assert iterations[-1] < 7
    assert distances[-1] < distances[0] / 20
    assert figures[-1]["train/val/rewards/accuracies"] <= 0.56


def test_a_model_that_has_learned_the_data_stays_there(tmp_path: Path) -> None:
    rows = play(tmp_path / "near", "near", "model.spin.ref_policy_kl_penalty=2", "trainer.spin.max_iterations=2")
    distances = [figures["kl"] for _, figures in rows]
    assert distances[0] < 0.1
    assert distances[-1] < distances[0] + 0.03


@pytest.mark.last
@pytest.mark.skipif(os.environ.get("NEMO_SPIN_SKIP_SLOW") == "1", reason="NEMO_SPIN_SKIP_SLOW is set")
def test_the_study_runs_as_it_stands(tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = [sys.executable, str(STUDY / "run.py"), "--fast", "--no-gsm8k", "--output", str(output)]
    environment = os.environ | {"PYTHONPATH": str(REPO), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    results = [json.loads(path.read_text()) for path in (output / "results").glob("*.json")]
    assert [result["error"] for result in results] == [None] * len(results)
    assert "SPIN improves the SFT model" in done.stdout
    page = (output / "study.html").read_text(encoding="utf-8")
    verdicts = re.findall(r"^ *(holds|fails|undecided|not measured)  ", done.stdout, re.MULTILINE)
    assert page.count('<article id="claim-') == len(verdicts) >= 20
    assert "not measured" not in verdicts

    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert again.returncode == 0
    assert "Runs to make: 0." in again.stdout
