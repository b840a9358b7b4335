"""How many tokens the key/value cache may hold."""

from __future__ import annotations

import os

import psutil
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from nemo_spin.errors import UserError
from nemo_spin.generation.cache import CacheShape, round_up

GIB = 2**30
# Of what is free when generation begins. The rest is for activations and logits; while a cache grows, one layer of it
# is there twice. On a CPU the machine has other work.
_SHARE_OF_GPU = 0.8
_SHARE_OF_HOST = 0.5


def cache_tokens(shape: CacheShape, gib: float | None) -> int:
    """Tokens that the cache of this model-parallel group may hold, every rank of it having agreed.

    gib: GiB of each process; None for a share of the memory that is free now.
    """
    limit = _free_bytes(shape.device) if gib is None else int(gib * GIB)
    tokens = torch.tensor(limit // shape.bytes_per_token, dtype=torch.int64, device=shape.device)
    group = parallel_state.get_model_parallel_group()
    if group.size() > 1:
        dist.all_reduce(tokens, dist.ReduceOp.MIN, group=group)
    return int(tokens)


def rows_that_fit(tokens: int, longest: int, shape: CacheShape) -> int:
    """How many rows of `longest` tokens the cache holds. Raises UserError if there is not room for one."""
    fit = tokens // round_up(longest)
    if not fit:
        needed, allowed = (n * shape.bytes_per_token / GIB for n in (round_up(longest), tokens))
        raise UserError(
            f"The KV cache cannot hold a sequence of {longest} tokens, which takes {needed:.3g} GiB on each process: "
            f"model.spin.kv_cache_gib, or the memory that is free, allows {allowed:.3g}; raise it, or lower "
            "model.spin.length_params.max_length."
        )
    return fit


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch keeps for later, and nothing uses, is free as well.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(_SHARE_OF_GPU * (free + kept))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    return int(_SHARE_OF_HOST * psutil.virtual_memory().available) // processes
