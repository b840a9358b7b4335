"""A checkpoint on its way to disk: every process writes its part in a thread, the first one makes the whole of them.

Collectives belong to the main thread alone. These threads talk over the store by which the process group was made: it
needs no collective, and no disk, which may be what has failed.
"""

from __future__ import annotations

import pickle
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.storage import WriteResult

from nemo_spin.checkpoint.manifest import Digest, digest_of
from nemo_spin.model_io.stores.sharded import ShardWriter
from nemo_spin.runtime.kill_points import reached

_PAUSE = 0.01, 0.5  # seconds between two looks at the store: the first, and the longest
_MOST_STEPS_TO_RETRY = 64


@dataclass(frozen=True)
class Part:
    """What one process wrote. digests: of its files, by the path within the checkpoint."""

    results: list[WriteResult]
    digests: dict[str, Digest]


@dataclass(frozen=True)
class Outcome:
    """What became of a checkpoint, the same on every process.

    path: where it is, None where it could not be written. error: why. notes: what went wrong and does no harm.
    bug: a traceback, of something that is neither.
    """

    path: Path | None = None
    error: str = ""
    notes: list[str] = field(default_factory=list)
    bug: str = ""


class Saving:
    """Writes in the background from the moment it is made."""

    def __init__(
        self,
        name: str,
        unfinished: Path,
        writer: ShardWriter,
        publish: Callable[[Sequence[Part]], Outcome],
        explain: Callable[[int, OSError], str],
    ) -> None:
        """
        Args:
            name: of the conversation about it: the same on every process, and not used before.
            unfinished: the directory to write to, removed if it cannot be.
            publish: makes the checkpoint of the parts of all processes, on the first one.
            explain: (rank, error) as words, for `Outcome.error`.
        """
        self.outcome: Outcome | None = None
        self._store = dist.PrefixStore(f"nemo_spin/{name}", dist.distributed_c10d._get_default_store().clone())
        self._is_given_up = False
        self.unfinished = unfinished
        self._writer = writer
        self._publish = publish
        self._explain = explain
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> Outcome:
        """Wait for the outcome. Raises RuntimeError if there is none, because another process is gone."""
        self._thread.join()
        if self.outcome is None:
            # As communication says it, for it is no more the cause than that is.
            raise RuntimeError(f"{self.unfinished} was not written: connection closed by another process")
        if self.outcome.bug:
            raise RuntimeError(f"{self.unfinished} was not written:\n{self.outcome.bug}")
        return self.outcome

    def give_up(self, seconds: float) -> None:
        """Wait so long for the other processes, which may be gone, and no longer."""
        self._thread.join(seconds)
        self._is_given_up = True

    def _run(self) -> None:
        rank = dist.get_rank()
        try:
            self._put(f"part {rank}", self._part())
            if rank == 0:
                parts = [self._take(f"part {other}") for other in range(dist.get_world_size())]
                self._put("outcome", self._conclude(parts))
            self.outcome = self._get("outcome")
        except Exception:
            # Nobody waits any more, or the store is gone with its process: what the others wrote is of no use.
            self.outcome = None

    def _part(self) -> Part | OSError | str:
        try:
            files, results = self._writer.write()
            digests = {str(file.relative_to(self.unfinished)): digest_of(file) for file in files}
            reached("checkpoint/shards-written")
            return Part(results, digests)
        except OSError as error:
            return error
        except Exception:
            return traceback.format_exc()

    def _conclude(self, parts: Sequence[Part | OSError | str]) -> Outcome:
        try:
            for rank, part in enumerate(parts):
                if isinstance(part, str):
                    return Outcome(bug=f"rank {rank}: {part}")
                if isinstance(part, OSError):
                    return self._failed(rank, part)
            return self._publish([part for part in parts if isinstance(part, Part)])
        except OSError as error:
            return self._failed(0, error)
        except Exception:
            return Outcome(bug=traceback.format_exc())

    def _put(self, key: str, value: Any) -> None:
        self._store.set(key, pickle.dumps(value))

    def _get(self, key: str) -> Any:
        """Wait for the value. Raises InterruptedError when this process has given up."""
        pause, longest = _PAUSE
        while not self._store.check([key]):
            if self._is_given_up:
                raise InterruptedError
            time.sleep(pause)
            pause = min(2 * pause, longest)
        return pickle.loads(self._store.get(key))

    def _take(self, key: str) -> Any:
        """As `_get`, and free the memory that the store needs for it."""
        value = self._get(key)
        self._store.delete_key(key)
        return value

    def _failed(self, rank: int, error: OSError) -> Outcome:
        shutil.rmtree(self.unfinished, ignore_errors=True)
        return Outcome(error=self._explain(rank, error))


class Retries:
    """When a checkpoint that could not be written is tried again.

    It counts steps, so that every process decides alike: the first time after one step, then after 2, 4, ... 64.
    """

    def __init__(self) -> None:
        self._wait = 0
        self._due_at: int | None = None

    @property
    def is_failing(self) -> bool:
        return self._due_at is not None

    def failed(self, step: int) -> int:
        """Writing failed; `step` has been made since. Returns after how many steps it is tried again."""
        self._wait = min(2 * self._wait, _MOST_STEPS_TO_RETRY) or 1
        self._due_at = step + self._wait
        return self._wait

    def succeeded(self) -> None:
        self._wait, self._due_at = 0, None

    def is_due(self, step: int) -> bool:
        return self._due_at is not None and step >= self._due_at
