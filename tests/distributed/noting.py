"""A training run that notes what it generates and trains on, in chunks of few rollouts, and can be made to fail."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from runs import InterruptedRunError, training_run

from nemo_spin.generation.engine import Generator
from nemo_spin.reporting.console import Reporter
from nemo_spin.runtime.stopping import Stopping
from nemo_spin.selfplay.megatron_policy import MegatronPolicy
from nemo_spin.selfplay.pairs import Pair
from nemo_spin.selfplay.rollouts import iteration as iteration_rollouts
from nemo_spin.selfplay.rollouts import part

# 8 rollouts in a chunk of one data-parallel replica.
SMALL_CHUNKS = {"model.spin.rollout_batch_size": 4}


class Notes:
    """requested, finished: (iteration, index) of responses of this rank's replica. trained: indices by step; pairs: the
    pairs themselves."""

    def __init__(self, fail_after: int | None, leave_off_after: int | None) -> None:
        self.requested: list[tuple[int, int]] = []
        self.finished: list[tuple[int, int]] = []
        self.trained: list[list[int]] = []
        self.pairs: list[list[Pair]] = []
        self.said: list[str] = []
        self.fail_after, self.leave_off_after = fail_after, leave_off_after

    def generate(self, original: Callable) -> Callable:
        def generate(
            generator: Generator, requests: Any, iteration: int, progress: Any, finished: Any, interrupted: Any
        ) -> Any:
            self.requested += [(iteration, request.index) for request in requests]

            def note(response: Any) -> None:
                if finished is not None:
                    finished(response)
                self.finished.append((iteration, response.index))
                if len(self.finished) == self.fail_after:
                    raise InterruptedRunError

            return original(generator, requests, iteration, progress, note, interrupted)

        return generate

    def train_step(self, original: Callable) -> Callable:
        def train_step(model: Any, pairs: Any, beta: float) -> Any:
            self.trained.append([pair.example.index for pair in pairs])
            self.pairs.append(list(pairs))
            return original(model, pairs, beta)

        return train_step

    def interrupted(self) -> bool:
        return self.leave_off_after is not None and len(self.finished) >= self.leave_off_after

    def ask(self, stopping: Stopping) -> bool:
        of_any = torch.tensor(self.interrupted(), dtype=torch.int32)
        torch.distributed.all_reduce(of_any, torch.distributed.ReduceOp.MAX)
        stopping.reason = "the time is up" if of_any else None
        return stopping.asked


def noted_run(
    *args: Any,
    fail_after: int | None = None,
    leave_off_after: int | None = None,
    parts_without_room: int = 0,
    **kwargs: Any,
) -> dict[str, Any]:
    """`training_run` with the attributes of `Notes` in what it returns.

    fail_after, leave_off_after: so many responses of a replica the run ends in the midst of it, or is told that its
    time is up. parts_without_room: for so many files of rollouts the disk is full.
    """
    notes = Notes(fail_after, leave_off_after)
    room = iter([False] * parts_without_room)
    fsync = part.os.fsync

    def full(descriptor: int) -> None:
        if not next(room, True):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    # Only what writes rollouts sees it.
    disk = mock.Mock(wraps=part.os, fsync=full)
    with (
        mock.patch.object(iteration_rollouts, "_CHUNK", 2),
        mock.patch.object(part, "os", disk),
        mock.patch.object(Generator, "generate", notes.generate(Generator.generate)),
        mock.patch.object(MegatronPolicy, "train_step", notes.train_step(MegatronPolicy.train_step)),
        mock.patch.object(Stopping, "ask", lambda stopping: notes.ask(stopping)),
        mock.patch.object(Stopping, "interrupted", notes.interrupted),
        mock.patch.object(Reporter, "say", lambda _, message: notes.said.append(message)),
    ):
        result = training_run(*args, **SMALL_CHUNKS | kwargs)
    return result | {name: getattr(notes, name) for name in ("requested", "finished", "trained", "pairs", "said")}


def parts_in(run_dir: str, iteration: int = 0) -> list[Path]:
    return sorted((Path(run_dir) / "rollouts" / f"iteration-{iteration:03d}").glob("part-*"))
