"""The directory of an iteration's rollouts: what of it is of use, what is still to be written, what may go.

    part-00000.parquet            rollouts, in the order in which they were made
    journal-LIFE-NUMBER-REPLICA   responses that are not in a part yet; LIFE is another one each time a run is started

One process reads and writes here; only journals are written by others.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from nemo_spin.selfplay.rollouts.journal import read_journal
from nemo_spin.selfplay.rollouts.part import ForeignError, Origin, Part, UnreadableError, read_part, write_part
from nemo_spin.selfplay.rollouts.roll_out import Answer, Key, Rollout

T = TypeVar("T")


@dataclass(slots=True)
class Found:
    """What was found. rollouts, responses: of use, the latter without log-probabilities. unreadable, foreign: files."""

    rollouts: int = 0
    responses: int = 0
    unreadable: int = 0
    foreign: int = 0

    @property
    def anything(self) -> bool:
        return any((self.rollouts, self.responses, self.unreadable, self.foreign))

    def __str__(self) -> str:
        ignored = [
            f"{count} {what}"
            for count, what in ((self.unreadable, "damaged"), (self.foreign, "of another reference or other settings"))
            if count
        ]
        line = f"{self.rollouts} rollouts and {self.responses} responses without log-probabilities are used again"
        return line + (f"; files ignored: {', '.join(ignored)}" if ignored else "")


class RolloutDirectory:
    """See above. row: makes the row for people of a rollout."""

    def __init__(self, path: Path, origin: Origin, row: Callable[[Rollout], dict]) -> None:
        self.path, self.origin = path, origin
        self.life = secrets.token_hex(4)
        self.found = Found()
        self._row = row
        self._written: list[Path] = []
        self._pending: list[list[Rollout]] = []
        # What a run with other rollouts has left: it goes when the first of ours is written.
        self._useless: list[Path] = []
        self._journals: dict[Path, set[Key]] = {}
        self._in_parts: set[Key] = set()

    # ------------------------------------------------------------------------------------------ finding

    def read_parts(self, checkpointed: Sequence[Path] = (), trusted: bool = True) -> Iterator[list[Rollout]]:
        """The rollouts of each file that is of use, those of a checkpoint first; none comes twice.

        checkpointed: files of a checkpoint. What of them is not in the directory is written to it again, with the next
        rollouts. trusted: their origin does not matter, the checkpoint vouches for them.
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

    def read_journals(self) -> dict[Key, Answer]:
        """The responses that are in no part."""
        answers: dict[Key, Answer] = {}
        for path in self._paths_of_journals("*"):
            journal = self._noting(read_journal, path, self.origin)
            if journal is None:
                continue
            open_rows = journal.keys() - self._in_parts
            if open_rows:
                self._journals[path] = open_rows
                answers |= {key: journal[key] for key in open_rows}
            else:
                self._useless.append(path)
        self.found.responses = len(answers)
        return answers

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
        new = [rollout for rollout in rollouts if rollout.key not in self._in_parts]
        self._in_parts.update(rollout.key for rollout in new)
        self.found.rollouts += len(new)
        return new

    # ------------------------------------------------------------------------------------------ writing

    def journal_path(self, number: int, replica: int) -> Path:
        return self.path / f"journal-{self.life}-{number:05d}-{replica:04d}"

    def add(self, rollouts: list[Rollout]) -> OSError | None:
        """Write rollouts, and with them what could not be written before; see `write`."""
        self._pending.append(rollouts)
        # What has been journaled in this life is in these rollouts, or in earlier ones.
        for path in self._paths_of_journals(f"{self.life}-*"):
            self._journals.setdefault(path, {rollout.key for rollout in rollouts})
        return self.write()

    def write(self) -> OSError | None:
        """Write what is not written yet. Returns the error if that cannot be done; it is kept, to be tried again."""
        try:
            while self._pending:
                rollouts = self._pending[0]
                path = self.path / f"part-{self._next_number():05d}.parquet"
                write_part(path, [self._row(rollout) for rollout in rollouts], rollouts, self.origin)
                del self._pending[0]
                self._written.append(path)
                self._in_parts.update(rollout.key for rollout in rollouts)
                self._remove_what_is_of_no_use()
        except OSError as error:
            return error
        return None

    @property
    def files(self) -> list[Path]:
        """Those that are written."""
        return sorted(self._written)

    def _remove_what_is_of_no_use(self) -> None:
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


def _number(part: Path) -> int:
    digits = part.stem.removeprefix("part-")
    return int(digits) if digits.isdecimal() else -1
