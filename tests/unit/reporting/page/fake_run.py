"""A run directory as training writes it, without training: two or three iterations with plausible curves.

`python fake_run.py DIR [STEPS]` makes one to look at.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

LN_2 = math.log(2.0)
START = 1_760_000_000.0

CONFIG = """\
trainer:
  num_nodes: 2
  devices: 8
  precision: bf16
  spin:
    max_iterations: {iterations}
    max_epochs: 2
    max_steps: -1
    gradient_clip_val: 1.0
pretrained_checkpoint:
  restore_from_path: /models/llama3_8b_sft.nemo
model:
  tensor_model_parallel_size: 4
  pipeline_model_parallel_size: 2
  sequence_parallel: true
  global_batch_size: 64
  spin:
    ref_policy_kl_penalty: [{betas}]
  optim:
    lr: 5e-7
  data:
    train_ds:
      file_path: /data/train.jsonl
"""

Line = dict[str, Any]


def lines(iterations: int = 3, steps: int = 200, seed: int = 0) -> list[Line]:
    """The lines of a run that went well, from its start to its end."""
    rng = random.Random(seed)
    made: list[Line] = []
    now = START

    def add(kind: str, step: int, iteration: int, **values: Any) -> None:
        nonlocal now
        now += values.get("time/rollout", 0.0) + values.get("time/train_step", 0.0) + values.get("time/validation", 0.0)
        made.append({"time": now, "step": step, "iteration": iteration, "kind": kind, **values})

    add("start", 0, 0, version="0.1.0", total_steps=iterations * steps)
    add("validation", 0, 0, val_loss=1.62, **{"time/validation": 40.0})
    for iteration in range(iterations):
        first = iteration * steps
        length = 180.0 - 4 * iteration
        cut_off = 0.04 / (iteration + 1)
        rollout = {
            "rollout/responses": 6400.0,
            "rollout/length": length,
            "rollout/finish_reason_stop": 1 - cut_off,
            "rollout/finish_reason_length": cut_off,
            "rollout/empty": 0.001,
            "rollout/repeated": 0.01,
            "rollout/exact_match": 0.02 * (iteration + 1),
            "throughput/rollout_tokens_per_second": 21_000.0 + 300 * iteration,
        }
        add("rollout", first, iteration, **rollout, **{"time/rollout": 900.0 - 30 * iteration})
        train: dict[str, float] = {}
        for done in range(1, steps + 1):
            train = _train(rng, iteration, done, steps)
            position = {
                "epoch": 2 * (done - 1) // steps,
                "iteration_step": done,
                "consumed_samples": 64 * (first + done),
            }
            add("train", first + done, iteration, **position, **train)
            if done in (steps // 2, steps):
                held_out = {
                    "val/loss": train["loss"] + 0.05,
                    "val/rewards/margins": 0.8 * train["rewards/margins"],
                    "val/rewards/accuracies": train["rewards/accuracies"] - 0.05,
                }
                nll = 1.62 - 0.03 * iteration - 0.03 * done / steps
                add("validation", first + done, iteration, val_loss=nll, **held_out, **{"time/validation": 40.0})
        summary = {name: rollout[name] for name in rollout if name.startswith("rollout/")}
        add("iteration", first + steps, iteration, **train, **summary, val_loss=1.59 - 0.03 * iteration)
    add("end", iterations * steps, iterations - 1)
    return made


def _train(rng: random.Random, iteration: int, done: int, steps: int) -> dict[str, float]:
    progress = 0.0 if done == 1 else 1 - math.exp(-4 * done / steps)
    noise = 0.0 if done == 1 else 1.0
    margin = (1.6 - 0.4 * iteration) * progress + noise * rng.gauss(0, 0.12)
    chosen = 0.35 * progress + noise * rng.gauss(0, 0.05)
    tokens = rng.gauss(170, 9)
    return {
        "loss": math.log1p(math.exp(-margin)),
        "rewards/chosen": chosen,
        "rewards/rejected": chosen - margin,
        "rewards/margins": margin,
        "rewards/accuracies": min(0.97, 0.5 + 0.36 * progress + noise * rng.gauss(0, 0.04)),
        "logps/chosen": -1.4 * tokens + chosen / 0.1,
        "logps/rejected": -1.1 * (tokens + 8) + (chosen - margin) / 0.1,
        "kl": max(0.0, 9 * progress + noise * rng.gauss(0, 0.8)),
        "grad_norm": 0.5 + 0.4 * math.exp(-8 * done / steps) + abs(rng.gauss(0, 0.12)),
        "lr": 5e-7 * min(1.0, done / max(1, steps // 10)) * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done / steps))),
        "tokens/chosen": tokens,
        "tokens/rejected": tokens + 8,
        "time/train_step": 6.0 + rng.random(),
        "throughput/train_tokens_per_second": 15_000 + rng.gauss(0, 400),
        "memory/peak_gib": 61.0 + 0.01 * done / steps,
    }


def each(change: Callable[[Line], Any], kind: str = "train") -> Callable[[list[Line]], None]:
    """A change of every line of a kind, for `make`."""

    def apply(all_lines: list[Line]) -> None:
        for line in all_lines:
            if line["kind"] == kind:
                change(line)

    return apply


def make(
    directory: Path,
    iterations: int = 3,
    steps: int = 40,
    change: Callable[[list[Line]], Any] = lambda all_lines: None,
    betas: str = "0.1, 0.1, 0.5",
) -> Path:
    """Write a run directory. change: done to its lines before they are written."""
    directory.mkdir(parents=True)
    made = lines(iterations, steps)
    change(made)
    write_lines(directory, made)
    (directory / "config.yaml").write_text(CONFIG.format(iterations=iterations, betas=betas), encoding="utf-8")
    checkpoints = directory / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / "latest").write_text(f"iteration-{iterations:03d}-step-{iterations * steps:07d}\n")
    (checkpoints / "megatron_gpt_spin.nemo").touch()
    for iteration in range(iterations):
        write_rollouts(directory, iteration, [row(index, iteration) for index in range(12)])
    return directory


def write_lines(directory: Path, made: list[Line]) -> None:
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in made), encoding="utf-8")


def row(index: int, iteration: int, **changes: Any) -> dict[str, Any]:
    """A row of a rollout file. changes: of its values."""
    chosen = f"The answer to question {index} is {index * index}, as {index} times {index} shows."
    rejected = (
        chosen if index % 5 == iteration else f"I think that it is {index * (index + 3 - iteration)}. " * (1 + index)
    )
    values = {
        "index": index,
        "sample": 0,
        "prompt": f"User: What is the square of {index}?\nAssistant:",
        "chosen": chosen,
        "rejected": rejected,
        "prompt_ids": [1, 2, 3],
        "chosen_ids": [4] * 16,
        "rejected_ids": [5] * (10 + index),
        "prompt_length": 3,
        "chosen_length": 16,
        "rejected_length": 10 + index,
        "finish_reason": "length" if index % 7 == 6 else "stop",
        "ref_chosen_logps": -24.5,
        "ref_rejected_logps": -11.25,
    }
    return values | changes


def write_rollouts(directory: Path, iteration: int, rows: list[dict[str, Any]], part: int = 0) -> Path:
    folder = directory / "rollouts" / f"iteration-{iteration:03d}"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"part-{part:05d}.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


if __name__ == "__main__":
    make(Path(sys.argv[1]), steps=int(sys.argv[2]) if len(sys.argv) > 2 else 200)
