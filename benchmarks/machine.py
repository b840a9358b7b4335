"""Measures what the cost model wants to know of the machine, in every process of a layout at the same time.

So that what processes share, cores or the memory's bandwidth, is what each of them gets.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from cost_model import Link, Machine
from megatron.core import parallel_state
from torch.distributed import ProcessGroup

MIB = 2**20
_ROUNDS, _SECONDS = 5, 0.06
_NOTHING = Link(float("inf"), 0.0)


def now() -> float:
    """Seconds, when all that was asked of the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(call: Callable[[], object], times: int | None = None) -> float:
    """Of one call: the median over some rounds, after one to warm up.

    times: calls of a round; None: as many as take a while, the same number in every process.
    """
    call()
    if times is None:
        start = now()
        call()
        count = torch.tensor(max(1.0, _SECONDS / max(now() - start, 1e-7)))
        if dist.get_backend() == "nccl":
            count = count.cuda()
        dist.all_reduce(count, op=dist.ReduceOp.MIN)
        times = int(count)
    taken = []
    for _ in range(_ROUNDS):
        start = now()
        for _ in range(times):
            call()
        taken.append((now() - start) / times)
    return statistics.median(taken)


def measure(
    tokens: int,
    hidden: int,
    ffn: int,
    weight_bytes: int,
    device: torch.device,
    dtype: torch.dtype,
    layer_seconds: float,
) -> Machine:
    """tokens, hidden, ffn: sizes of the matrix products. weight_bytes: read at a time, as in a decode step.

    layer_seconds: see `Machine`. Every process has to call.
    """
    x, w = torch.randn(tokens, hidden, device=device, dtype=dtype), torch.randn(ffn, hidden, device=device, dtype=dtype)
    product = seconds_of(lambda: torch.nn.functional.linear(x, w))
    itemsize = torch.finfo(dtype).bits // 8
    matrix = torch.randn(max(1, weight_bytes // itemsize // 1024), 1024, device=device, dtype=dtype)
    vector = torch.randn(1024, device=device, dtype=dtype)
    reading = seconds_of(lambda: matrix @ vector)
    return Machine(
        flops=2 * tokens * hidden * ffn / product,
        bandwidth=matrix.numel() * itemsize / reading,
        layer_seconds=layer_seconds,
        tensor=_collectives(parallel_state.get_tensor_model_parallel_group(), device),
        pipeline=_neighbours(parallel_state.get_pipeline_model_parallel_group(), device),
        data=_collectives(parallel_state.get_data_parallel_group(), device),
        bytes_per_value=itemsize,
    )


def _collectives(group: ProcessGroup, device: torch.device) -> Link:
    """From the time of a small and of a large all-reduce."""
    size = dist.get_world_size(group)
    if size == 1:
        return _NOTHING
    few, many = torch.zeros(16, device=device), torch.zeros(4 * MIB // 4, device=device)
    steps = 2 * (size - 1)
    latency = seconds_of(lambda: dist.all_reduce(few, group=group)) / steps
    rest = seconds_of(lambda: dist.all_reduce(many, group=group)) / steps - latency
    return Link(4 * MIB / size / max(rest, 1e-9), latency)


def _neighbours(group: ProcessGroup, device: torch.device) -> Link:
    """From the time of a small and of a large message between the first two stages, there and back."""
    ranks = dist.get_process_group_ranks(group)
    if len(ranks) == 1:
        return _NOTHING
    place = ranks.index(dist.get_rank())

    def there_and_back(message: torch.Tensor) -> None:
        if place == 0:
            dist.send(message, ranks[1], group=group)
            dist.recv(message, ranks[1], group=group)
        elif place == 1:
            dist.recv(message, ranks[0], group=group)
            dist.send(message, ranks[0], group=group)

    few, many = torch.zeros(16, device=device), torch.zeros(MIB // 4, device=device)
    latency = seconds_of(lambda: there_and_back(few)) / 2
    rest = seconds_of(lambda: there_and_back(many)) / 2 - latency
    return Link(MIB / max(rest, 1e-9), latency)
