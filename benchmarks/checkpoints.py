"""How long training stands still for a checkpoint: written in the background, and while it waits.

    python benchmarks/checkpoints.py [--rounds 7] [--directory DIR]

On the CPU, in one process: weights and optimizer of a Llama of 8 million parameters in fp32, 100 MB. The two ways take
turns on the same disk, because other work slows both; the ratio is the median over the rounds of the ratio within a
round. `until it is written` is what a save in the background takes in all, while nothing else is done.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import nemo_spin.cli.silence_libraries  # noqa: F401, I001

import workload

from nemo_spin.checkpoint.run_state import RunState
from nemo_spin.checkpoint.manager import TrainingCheckpoints
from nemo_spin.config import CheckpointConfig
from nemo_spin.megatron import setup
from nemo_spin.runtime.progress import Progress

SIDES = {"in the background": True, "waiting": False}


class Model:
    """Policy and optimizer, as a run's checkpoints have them."""

    reference_is_needed = False

    def __init__(self) -> None:
        self.gpt, self.optimizer = workload.policy(steps=1000)

    def sharded_training_state(self, with_reference: bool, is_loading: bool) -> dict[str, Any]:
        state = self.gpt.sharded_state_dict()
        policy = {name: shard for name, shard in state.items() if not name.endswith("_extra_state")}
        return {"policy": policy, "optimizer": self.optimizer.sharded_state_dict(policy, is_loading)}

    def load_training_state(self, state: dict[str, Any], mid_iteration: bool) -> None:
        raise NotImplementedError


def measure(rounds: int, directory: Path) -> dict[str, list[float]]:
    """Seconds for which `save` keeps the caller, by side and round, and until the one in the background is written."""
    model = Model()
    checkpoints = {
        side: TrainingCheckpoints(
            directory / side, CheckpointConfig("val_loss", "min", 0, in_background, False, False, False, False)
        )
        for side, in_background in SIDES.items()
    }
    seconds: dict[str, list[float]] = {side: [] for side in (*SIDES, "until it is written")}
    for step in range(rounds + 1):
        for side in SIDES:
            start = time.perf_counter()
            state = RunState(Progress(0, step, step, step), {})
            checkpoints[side].save(model, state, keep=False)
            kept = time.perf_counter() - start
            checkpoints[side].settle(step, wait=True)
            if step > 0:  # the first one pays for what is made once
                seconds[side].append(kept)
                if SIDES[side]:
                    seconds["until it is written"].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="How long training stands still for a checkpoint.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--directory", help="where to write; default: the system's temporary directory")
    arguments = parser.parse_args()
    setup.initialize(1, 1, seed=1)
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        seconds = measure(arguments.rounds, Path(directory))
    setup.shutdown()
    for what, values in seconds.items():
        print(f"{what:22} {statistics.median(values):7.3f} s   ({min(values):.3f} to {max(values):.3f})")
    background, waiting = (seconds[side] for side in SIDES)
    ratio = statistics.median(w / b for w, b in zip(waiting, background, strict=True))
    print(f"waiting / in the background: {ratio:.1f}   (load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores)")


if __name__ == "__main__":
    main()
