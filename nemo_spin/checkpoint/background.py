"""A checkpoint on its way to disk: every process writes its part in a thread, the first one makes the whole of them."""

from __future__ import annotations

import shutil
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist
from torch.distributed.checkpoint.storage import WriteResult

from nemo_spin.checkpoint.channel import Channel
from nemo_spin.checkpoint.manifest import Digest, digest_of
from nemo_spin.model_io.stores.sharded import ShardWriter
from nemo_spin.runtime.kill_points import reached


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
        channel: Channel,
        unfinished: Path,
        writer: ShardWriter,
        publish: Callable[[Sequence[Part]], Outcome],
        explain: Callable[[int, OSError], str],
    ) -> None:
        """unfinished: the directory to write to, removed if it cannot be. publish: makes the checkpoint of the parts of
        all processes, on the first one. explain: (rank, error) as words, for `Outcome.error`.
        """
        self.outcome: Outcome | None = None
        self._channel = channel
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
        self._channel.is_given_up = True

    def _run(self) -> None:
        rank = dist.get_rank()
        try:
            self._channel.put(f"part {rank}", self._part())
            if rank == 0:
                parts = [self._channel.take(f"part {other}") for other in range(dist.get_world_size())]
                self._channel.put("outcome", self._conclude(parts))
            self.outcome = self._channel.get("outcome")
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

    def _failed(self, rank: int, error: OSError) -> Outcome:
        shutil.rmtree(self.unfinished, ignore_errors=True)
        return Outcome(error=self._explain(rank, error))
