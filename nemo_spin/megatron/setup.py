"""Process groups and devices: NCCL with CUDA, gloo without."""

from __future__ import annotations

import math
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from nemo_spin.errors import ConfigError
from nemo_spin.megatron import cpu_backend
from nemo_spin.runtime.rendezvous import rendezvous

# Processes that do not come at all are missed sooner than those that are long in coming back from their work.
_SECONDS_TO_GATHER = 1800.0

_store: dist.Store | None = None


def initialize(
    tensor_model_parallel_size: int,
    pipeline_model_parallel_size: int,
    seed: int,
    timeout: timedelta = timedelta(minutes=30),
) -> None:
    """Join the process group that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe (or make one of a single
    process) and lay tensor and pipeline parallelism over it; the rest of the processes is data parallel.

    Raises ConfigError if the number of processes is not a multiple of the model-parallel size.
    """
    cpu_backend.install()
    # megatron-core overlaps communication with computation by the order in which kernels were launched.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if not dist.is_initialized():
        if torch.cuda.is_available():
            # srun may show each process one GPU only, whatever its local rank.
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        global _store
        _store, rank, world_size = rendezvous(min(timeout, timedelta(seconds=_SECONDS_TO_GATHER)))
        _store.set_timeout(timeout)
        group_store = dist.PrefixStore("process_groups", _store)
        dist.init_process_group(backend, store=group_store, rank=rank, world_size=world_size, timeout=timeout)
    model_parallel_size = tensor_model_parallel_size * pipeline_model_parallel_size
    if dist.get_world_size() % model_parallel_size:
        raise ConfigError(
            f"{dist.get_world_size()} processes cannot be laid out as tensor_model_parallel_size "
            f"{tensor_model_parallel_size} x pipeline_model_parallel_size {pipeline_model_parallel_size}: "
            f"start a multiple of {model_parallel_size}."
        )
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size,
        pipeline_model_parallel_size,
        distributed_timeout_minutes=math.ceil(timeout / timedelta(minutes=1)),
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def store() -> dist.Store | None:
    """Where processes leave each other messages without the others taking part; None where the process group was not
    made by `initialize`. A thread beside the main one takes a `clone()` for itself.
    """
    return None if _store is None else dist.PrefixStore("nemo_spin", _store)


def is_initialized() -> bool:
    return dist.is_initialized() and parallel_state.model_parallel_is_initialized()


def layout() -> tuple[int, int]:
    """(tensor, pipeline) model-parallel size of the process groups."""
    return (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
    )


def shutdown() -> None:
    """Leave the process groups. Safe to call when there are none."""
    global _store
    _store = None
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
