"""What the processes of a run tell each other, in the main thread: every one of them makes the same calls.

Threads that write a checkpoint in the background talk over the store; see `checkpoint.background`.

A process that is alone keeps its objects to itself: gloo would copy them in a thread of its own, which from 32
thousand bytes on opens a pool of OpenMP threads there; with more threads than cores OpenMP no longer lets any of them
wait awake, and every later operation of the run takes a third longer.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def of_first(make: Callable[[], T]) -> T:
    """What `make` returns on the first process, on all of them; what it raises is raised on all of them."""
    result: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            result[0] = make()
        except Exception as error:
            result[1] = error
    result = from_first(result)
    if result[1] is not None:
        raise result[1]
    return result[0]


def from_first(value: T) -> T:
    """The value of the first process, on all of them."""
    if dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gathered(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """The values of all processes, or of those of a group, by rank."""
    if dist.get_world_size(group) == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
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


def is_main() -> bool:
    """Whether this is the first of the run's processes, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def device() -> torch.device:
    """The device of this process."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
