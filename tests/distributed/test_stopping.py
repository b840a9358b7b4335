"""All processes stop at the same step, whichever of them a signal has reached."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch.distributed as dist

from nemo_spin.runtime.stopping import Stopping


def stop_rank_3(store_path: str) -> dict[str, Any]:
    store = dist.FileStore(store_path, dist.get_world_size())
    stopping = Stopping()
    with stopping.signals(store):
        before = stopping.ask()
        dist.barrier()
        if dist.get_rank() == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        questions = 1
        while not stopping.interrupted():
            questions += 1
        return {"before": before, "questions": questions, "after": stopping.ask(), "reason": stopping.reason}


def test_a_signal_to_one_rank_stops_generation_and_training_of_all(workers: Any, tmp_path: Path) -> None:
    results = workers.run(stop_rank_3, str(tmp_path / "store"), tp=2, dp=2)
    assert [(r["before"], r["after"], r["reason"]) for r in results] == [(False, True, "SIGUSR1")] * 4
    # Ranks 0 and 1, and 2 and 3, are a model-parallel group each: asked equally often, answered alike.
    assert results[0]["questions"] == results[1]["questions"]
    assert results[2]["questions"] == results[3]["questions"]
