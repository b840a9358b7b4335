"""What processes tell each other about checkpoints.

Collectives belong to the main thread alone. Threads that write in the background use a `Channel`, on the store by
which the process group was made: it needs no collective, and no disk, which may be what has failed.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from nemo_spin.megatron.setup import device

T = TypeVar("T")
_PAUSE = 0.01, 0.5  # seconds between two looks at the store: the first, and the longest


def of_first(make: Callable[[], T]) -> T:
    """What `make` returns on the first process, on all of them; what it raises is raised on all of them."""
    result: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            result[0] = make()
        except Exception as error:
            result[1] = error
    dist.broadcast_object_list(result, src=0)
    if result[1] is not None:
        raise result[1]
    return result[0]


def gathered(value: T) -> list[T]:
    """The values of all processes, by rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def everywhere(condition: bool) -> bool:
    """Whether a condition holds on every process."""
    flag = torch.tensor([condition], dtype=torch.int32, device=device())
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)


def total(number: int) -> int:
    """The sum over all processes."""
    number_of_all = torch.tensor([number], dtype=torch.int64, device=device())
    dist.all_reduce(number_of_all)
    return int(number_of_all)


class GivenUpError(Exception):
    """Nobody waits for an answer any more."""


class Channel:
    """Values under names, for threads of the processes of a group."""

    def __init__(self, name: str) -> None:
        """name: the same on every process, and not used before."""
        self._store = dist.PrefixStore(f"nemo_spin/{name}", dist.distributed_c10d._get_default_store().clone())
        self.is_given_up = False

    def put(self, name: str, value: Any) -> None:
        self._store.set(name, pickle.dumps(value))

    def get(self, name: str) -> Any:
        """Wait for the value. Raises GivenUpError when this process has given up."""
        pause, longest = _PAUSE
        while not self._store.check([name]):
            if self.is_given_up:
                raise GivenUpError
            time.sleep(pause)
            pause = min(2 * pause, longest)
        return pickle.loads(self._store.get(name))

    def take(self, name: str) -> Any:
        """As `get`, and free the memory that the store needs for it."""
        value = self.get(name)
        self._store.delete_key(name)
        return value
