"""A model of two tensors, with which checkpoints are tried without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor

from nemo_spin.checkpoint.manager import TrainingCheckpoints
from nemo_spin.checkpoint.run_state import RunState
from nemo_spin.config import CheckpointConfig
from nemo_spin.runtime.progress import Progress

IDENTITY = {"model.seed": 7}


class SmallModel:
    """Weights and moments [4 x ranks, columns], four rows on each rank; `value` is in all of them."""

    reference_is_needed = False

    def __init__(self, value: float = 0.0, columns: int = 8) -> None:
        self.tensors = {name: torch.full((4, columns), value) for name in ("weight", "moment")}
        self.plain: Any = {"steps": value}

    @property
    def value(self) -> float:
        """What all of it agrees on."""
        values = {value for tensor in self.tensors.values() for value in tensor.unique().tolist()}
        (value,) = values | {float(self.plain["steps"])}
        return value

    def advance(self) -> None:
        """As an optimizer does: in place."""
        for tensor in self.tensors.values():
            tensor += 1
        self.plain = {"steps": self.plain["steps"] + 1}

    def sharded_training_state(self, with_reference: bool, is_loading: bool) -> dict[str, Any]:
        shards: dict[str, Any] = {
            name: ShardedTensor.from_rank_offsets(name, tensor, (0, dist.get_rank(), dist.get_world_size()))
            for name, tensor in self.tensors.items()
        }
        return {"policy": shards, **({} if is_loading else {"plain": self.plain})}

    def load_training_state(self, state: dict[str, Any], mid_iteration: bool) -> None:
        self.tensors, self.plain = dict(state["policy"]), state["plain"]


class Run:
    """A run that only saves. said: what it told people, the same on every rank."""

    def __init__(self, directory: str, columns: int = 8, asynchronous: bool = True) -> None:
        self.directory = Path(directory) / "checkpoints"
        self.said: list[str] = []
        options = CheckpointConfig("val_loss", "min", 0, asynchronous, False, False, False, False, False)
        self.checkpoints = TrainingCheckpoints(self.directory, options, self.said.append)
        self.columns = columns
        self.progress = Progress()
        self.model = SmallModel(columns=columns)
        self.rollouts = Path(directory) / "part-00000.parquet"
        if dist.get_rank() == 0:
            self.rollouts.write_bytes(b"rollouts" * 100)
        dist.barrier()

    def save(self, step: int, keep: bool = False, last: bool = False, wait: bool = True) -> None:
        """Save the model, whose value is the step from then on."""
        self.model = SmallModel(float(step), self.columns)
        self.progress = Progress(0, step, step, step)
        state = RunState(self.progress, IDENTITY, {"loss": 0.5}, {"rollouts": [self.rollouts]})
        self.checkpoints.save(self.model, state, keep, last)
        if wait:
            self.checkpoints.settle(step, wait=True)

    def resumed_value(self) -> float:
        """Of a model that is restored from the newest whole checkpoint; it says the same as state.json."""
        model = SmallModel(columns=self.columns)
        used, state = self.checkpoints.restore(self.checkpoints.latest(), model, lambda iteration: IDENTITY)
        assert model.value == state.progress.step
        assert [path.parent.parent for path in state.rollout_files["rollouts"]] == [used]
        return model.value

    def names(self) -> set[str]:
        """What lies in the directory."""
        dist.barrier()
        return {path.name for path in self.directory.iterdir()} if self.directory.is_dir() else set()
