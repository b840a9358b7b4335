"""The time that a run may take, after which it saves and ends by itself (SLURM's limit, a reservation)."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from nemo_spin.megatron.setup import device


class TimeLimit:
    """Whether the time is up, with the same answer for every process: that of the first one's clock."""

    def __init__(self, seconds: float | None) -> None:
        """seconds: from now on; None for no limit."""
        self._deadline = None if seconds is None else time.monotonic() + seconds

    def is_up(self) -> bool:
        """Every process has to ask."""
        if self._deadline is None:
            return False
        up = torch.tensor([time.monotonic() >= self._deadline], dtype=torch.int32, device=device())
        dist.broadcast(up, src=0)
        return bool(up)

    def interrupted(self) -> bool:
        """Whether generation is to leave off where it is. Every process of a model-parallel group has to ask."""
        return False
