"""How the processes of a run find each other, also when a launcher has started them again.

torchrun keeps one store for all attempts (torch 2.5 and later, c10d and static rendezvous). What an earlier attempt has
left there, addresses of processes that are gone above all, must not be taken for this one's. The count of restarts does
not tell attempts apart: each machine's launcher counts its own.
"""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

_SECONDS_BETWEEN_LOOKS = 0.05


def rendezvous(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """A store that the processes of this attempt share, this process's rank, and how many there are.

    As RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT have it; a single process without them. timeout: until all have
    come. Raises RuntimeError (torch's DistError) if they do not.
    """
    if "RANK" not in os.environ:
        return dist.HashStore(), 0, 1
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True):
        store = dist.PrefixStore(agreed_name(store, rank, world_size, timeout), store)
    return store, rank, world_size


def agreed_name(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """A name for this attempt that the first process has made up, the same for all, whatever the store holds already.

    Each of the others asks under a name of its own making, so that an answer can only be to this question.
    """
    if rank > 0:
        question = uuid.uuid4().hex
        store.set(f"attempt/question/{rank}", question)
        store.wait([f"attempt/answer/{question}"], timeout)
        name = store.get(f"attempt/answer/{question}").decode()
        store.set(f"attempt/heard/{name}/{rank}", "")
        return name
    name = uuid.uuid4().hex
    deadline = time.monotonic() + timeout.total_seconds()
    waiting = set(range(1, world_size))
    while waiting:
        for other in sorted(waiting):
            if store.check([f"attempt/question/{other}"]):
                question = store.get(f"attempt/question/{other}").decode()  # of an earlier attempt, perhaps
                store.set(f"attempt/answer/{question}", name)
        waiting = {other for other in waiting if not store.check([f"attempt/heard/{name}/{other}"])}
        if time.monotonic() > deadline:
            raise dist.DistError(f"ranks {sorted(waiting)} did not come within {timeout.total_seconds():.0f} s")
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    return name
