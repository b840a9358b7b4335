"""What threads that write checkpoints in the background tell each other.

Collectives belong to the main thread alone. A `Channel` is on the store by which the process group was made: it needs
no collective, and no disk, which may be what has failed.
"""

from __future__ import annotations

import pickle
import time
from typing import Any

import torch.distributed as dist

_PAUSE = 0.01, 0.5  # seconds between two looks at the store: the first, and the longest


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
