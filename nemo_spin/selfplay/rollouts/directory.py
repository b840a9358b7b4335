"""The directory of an iteration's rollouts: which files are usable, what is not written yet, what can be removed.

    part-00000.parquet            rollouts, in the order in which they were made
    journal-LIFE-NUMBER-REPLICA   responses that are not in a part yet; LIFE differs each time a run is started

Rank 0 alone reads and writes here, except that each data-parallel replica writes journals of its own.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from nemo_spin.generation.interface import Key, Response
from nemo_spin.selfplay.pairs import Rollout
from nemo_spin.selfplay.rollouts.journal import read_journal
from nemo_spin.selfplay.rollouts.part import ForeignError, Origin, Part, UnreadableError, read_part, write_part

T = TypeVar("T")


@dataclass(slots=True)
class Found:
    """What a directory and a checkpoint hold.

    rollouts: that are reused. responses: that are reused, but not scored yet. unreadable, foreign: files ignored.
    """

    rollouts: int = 0
    responses: int = 0
    unreadable: int = 0
    foreign: int = 0

    def __str__(self) -> str:
        """In words; empty if there is nothing."""
        reused = _counts({"scored rollouts": self.rollouts, "unscored responses": self.responses})
        ignored = _counts({"damaged": self.unreadable, "of another reference or other settings": self.foreign})
        parts = ("reusing ", " and ".join(reused)), ("files ignored: ", ", ".join(ignored))
        return "; ".join(what + which for what, which in parts if which)


class RolloutDirectory:
    """Reads and writes the directory at `path`.

    life: part of the names of this run's journals. found: what `read_parts` and `read_journals` have come to so far.
    """

    def __init__(self, path: Path, origin: Origin, row: Callable[[Rollout], dict]) -> None:
        """origin: of the rollouts that are usable, and of those that are written. row: see `part.row_of`."""
        self.path, self.origin = path, origin
        self.life = secrets.token_hex(4)
        self.found = Found()
        self._row = row
        self._written: list[Path] = []
        self._pending: list[list[Rollout]] = []
        # What a run with other rollouts has left: it is removed when the first of ours is written.
        self._useless: list[Path] = []
        self._journals: dict[Path, set[Key]] = {}
        self._in_parts: set[Key] = set()

    # ------------------------------------------------------------------------------------------ finding

    def read_parts(self, checkpointed: Sequence[Path] = (), trusted: bool = True) -> Iterator[list[Rollout]]:
        """Yield the rollouts of each usable file, those of a checkpoint first; no rollout is yielded twice.

        checkpointed: files of a checkpoint. Those that are missing from the directory are written to it together with
            the next rollouts.
        trusted: accept checkpointed files of any origin, because the checkpoint vouches for them.
        """
        self._useless = sorted(self.path.glob("*.tmp"))
        for path in checkpointed:
            part = self._noting(read_part, path, None if trusted else self.origin)
            if part is not None and (new := self._new(part.rollouts)):
                copy = self.path / path.name
                if self._is_copy(copy, path, part):
                    self._written.append(copy)
                else:
                    self._pending.append(new)
                yield new
        for path in self._parts():
            if path not in self._written and (part := self._noting(read_part, path, self.origin)) is not None:
                if new := self._new(part.rollouts):
                    self._written.append(path)
                    yield new
                else:
                    self._useless.append(path)

    def read_journals(self) -> dict[Key, Response]:
        """The responses that are in no part; `read_parts` comes first."""
        responses: dict[Key, Response] = {}
        for path in self._paths_of_journals("*"):
            journal = self._noting(read_journal, path, self.origin)
            if journal is None:
                continue
            open_rows = journal.keys() - self._in_parts
            if open_rows:
                self._journals[path] = open_rows
                responses |= {key: journal[key] for key in open_rows}
            else:
                self._useless.append(path)
        self.found.responses = len(responses)
        return responses

    def _noting(self, read: Callable[[Path, Origin | None], T], path: Path, origin: Origin | None) -> T | None:
        try:
            return read(path, origin)
        except UnreadableError:
            self.found.unreadable += 1
        except ForeignError:
            self.found.foreign += 1
        if path.parent == self.path:
            self._useless.append(path)
        return None

    def _is_copy(self, copy: Path, path: Path, part: Part) -> bool:
        try:
            return copy.samefile(path) or read_part(copy, self.origin).digest == part.digest
        except (OSError, UnreadableError, ForeignError):
            return False

    def _new(self, rollouts: list[Rollout]) -> list[Rollout]:
        new = [rollout for rollout in rollouts if rollout.response.key not in self._in_parts]
        self._in_parts.update(_keys(new))
        self.found.rollouts += len(new)
        return new

    # ------------------------------------------------------------------------------------------ writing

    def journal_path(self, number: int, replica: int) -> Path:
        return self.path / f"journal-{self.life}-{number:05d}-{replica:04d}"

    def add(self, rollouts: list[Rollout]) -> OSError | None:
        """Write rollouts, after those that could not be written before; see `write`."""
        self._pending.append(rollouts)
        # Every response that this run has journaled so far is in these rollouts, or in earlier ones.
        for path in self._paths_of_journals(f"{self.life}-*"):
            self._journals.setdefault(path, _keys(rollouts))
        return self.write()

    def write(self) -> OSError | None:
        """Write what is not written yet. Returns the error if that fails; the next call then tries again."""
        try:
            while self._pending:
                rollouts = self._pending[0]
                path = self.path / f"part-{self._next_number():05d}.parquet"
                write_part(path, [self._row(rollout) for rollout in rollouts], rollouts, self.origin)
                del self._pending[0]
                self._written.append(path)
                self._in_parts.update(_keys(rollouts))
                self._remove_useless()
        except OSError as error:
            return error
        return None

    @property
    def files(self) -> list[Path]:
        """Parts that are written."""
        return sorted(self._written)

    def _remove_useless(self) -> None:
        done = [path for path, keys in self._journals.items() if keys <= self._in_parts]
        for path in {*done, *self._useless} - {*self._written}:
            path.unlink(missing_ok=True)
        self._useless = []
        for path in done:
            del self._journals[path]

    def _next_number(self) -> int:
        return max((_number(path) for path in self._written), default=-1) + 1

    def _parts(self) -> list[Path]:
        return sorted(self.path.glob("part-*.parquet"))

    def _paths_of_journals(self, which: str) -> Iterable[Path]:
        return sorted(self.path.glob(f"journal-{which}"))


def _counts(numbers: dict[str, int]) -> list[str]:
    return [f"{number} {what}" for what, number in numbers.items() if number]


def _keys(rollouts: Iterable[Rollout]) -> set[Key]:
    return {rollout.response.key for rollout in rollouts}


def _number(part: Path) -> int:
    digits = part.stem.removeprefix("part-")
    return int(digits) if digits.isdecimal() else -1
