"""Rollouts on disk: what a run that goes on takes of what it finds, and what it makes of a disk that is full."""

from __future__ import annotations

import errno
import os
import random
from array import array
from pathlib import Path
from typing import Any

import pytest

from nemo_spin.data.example import Example
from nemo_spin.generation.interface import Response
from nemo_spin.selfplay.pairs import Rollout
from nemo_spin.selfplay.rollouts import journal as journals
from nemo_spin.selfplay.rollouts import part as parts
from nemo_spin.selfplay.rollouts.directory import RolloutDirectory
from nemo_spin.selfplay.rollouts.journal import Journal, read_journal
from nemo_spin.selfplay.rollouts.part import ForeignError, Origin, UnreadableError, read_part, row_of, write_part

ORIGIN = Origin("weights-1", "settings-1")
FULL = OSError(errno.ENOSPC, "No space left on device")


def rollout(index: int, iteration: int = 0) -> Rollout:
    # The last bit of a float counts.
    logp = -1.0 / (3 + index + iteration)
    response = Response(index, array("i", [index, 5, 2]), "stop" if index % 2 else "length", sample=1)
    return Rollout(response, logp, logp * 7)


def row(made: Rollout) -> dict[str, Any]:
    return row_of(made, Example(made.response.index, (1,), (2,)), str)


def directory(path: Path, origin: Origin = ORIGIN) -> RolloutDirectory:
    return RolloutDirectory(path, origin, row)


def written(path: Path, *chunks: range, origin: Origin = ORIGIN) -> RolloutDirectory:
    made = directory(path, origin)
    for chunk in chunks:
        assert made.add([rollout(index) for index in chunk]) is None
    return made


def found(path: Path, checkpointed: list[Path] | None = None, origin: Origin = ORIGIN) -> tuple[list[Rollout], Any]:
    reader = directory(path, origin)
    rollouts = [one for part in reader.read_parts(checkpointed or []) for one in part]
    reader.read_journals()
    return rollouts, reader


def test_what_is_written_is_found_to_the_last_bit(tmp_path: Path) -> None:
    written(tmp_path, range(3), range(3, 5))
    rollouts, reader = found(tmp_path)
    assert rollouts == [rollout(index) for index in range(5)]
    assert [path.name for path in reader.files] == ["part-00000.parquet", "part-00001.parquet"]


def test_damaged_bytes_are_never_taken_for_rollouts(tmp_path: Path) -> None:
    path = tmp_path / "part-00000.parquet"
    rollouts = [rollout(index) for index in range(4)]
    write_part(path, [row(one) for one in rollouts], rollouts, ORIGIN)
    whole = path.read_bytes()
    chance = random.Random(5)
    damaged = [whole[: len(whole) * k // 8] for k in range(8)]
    for _ in range(600):
        data = bytearray(whole)
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        damaged.append(bytes(data))
    unreadable = 0
    for data in damaged:
        path.write_bytes(data)
        try:
            # Texts for people may be damaged: they are not read.
            assert read_part(path, ORIGIN).rollouts == rollouts
        except (UnreadableError, ForeignError):
            unreadable += 1
    assert unreadable > 100


def test_what_is_of_no_use_is_ignored_and_goes_when_rollouts_are_written(tmp_path: Path) -> None:
    written(tmp_path, range(2))
    other = Origin("weights-2", ORIGIN.settings)
    theirs = written(tmp_path / "theirs", range(9), origin=other)
    os.rename(theirs.files[0], tmp_path / "part-00007.parquet")
    (tmp_path / "part-00003.parquet").write_bytes((tmp_path / "part-00000.parquet").read_bytes()[:-9])
    (tmp_path / "part-00004.tmp").write_bytes(b"PAR1")
    rollouts, reader = found(tmp_path)
    assert rollouts == [rollout(0), rollout(1)]
    assert (reader.found.unreadable, reader.found.foreign) == (1, 1)
    assert str(reader.found) == (
        "reusing 2 scored rollouts; files ignored: 1 damaged, 1 of another reference or other settings"
    )
    assert len(list(tmp_path.glob("part-*"))) == 4
    assert reader.add([rollout(2)]) is None
    assert sorted(path.name for path in tmp_path.glob("part-*")) == ["part-00000.parquet", "part-00001.parquet"]
    assert found(tmp_path, origin=other)[0] == []


def test_a_checkpoint_comes_before_the_directory(tmp_path: Path) -> None:
    checkpoint = written(tmp_path / "checkpoint", range(3), range(3, 6)).files
    run = tmp_path / "run"
    run.mkdir()
    os.link(checkpoint[0], run / checkpoint[0].name)
    # Not the checkpoint's second file, but of another layout, with other last bits: it has one rollout more.
    other = [rollout(index, iteration=1) for index in range(4, 7)]
    write_part(run / "part-00001.parquet", [row(one) for one in other], other, ORIGIN)
    rollouts, reader = found(run, checkpoint)
    assert rollouts == [rollout(index) for index in range(6)] + other[-1:]
    assert reader.write() is None
    again, _ = found(run)
    assert {one.response.index for one in again} == set(range(7))
    assert [path.name for path in reader.files] == [f"part-{i:05d}.parquet" for i in range(3)]


def journal_of(path: Path, indices: range, origin: Origin = ORIGIN) -> Journal:
    journal = Journal(path, origin)
    for index in indices:
        journal.append(Response(index, array("i", [index, 5, 2]), "stop", sample=1))
    journal.close()
    return journal


def test_a_torn_journal_holds_what_came_before(tmp_path: Path) -> None:
    path = tmp_path / "journal-0-0-0"
    journal_of(path, range(3))
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        complete = sum(size >= len(b"".join(lines[: k + 1])) for k in range(4))
        if complete == 0:
            with pytest.raises(UnreadableError):
                read_journal(path, ORIGIN)
        else:
            assert list(read_journal(path, ORIGIN)) == [(index, 1) for index in range(complete - 1)]
    flipped = bytearray(whole)
    flipped[len(lines[0] + lines[1]) + 12] ^= 1
    path.write_bytes(flipped)
    assert list(read_journal(path, ORIGIN)) == [(0, 1)]
    with pytest.raises(ForeignError):
        read_journal(path, Origin("weights-2", ORIGIN.settings))


def test_a_journal_goes_when_its_responses_are_in_a_part(tmp_path: Path) -> None:
    before = directory(tmp_path)
    journal_of(before.journal_path(1, 0), range(0, 4, 2))
    journal_of(before.journal_path(1, 1), range(1, 6, 2))
    reader = directory(tmp_path)
    assert list(reader.read_parts()) == [] and sorted(reader.read_journals()) == [
        (index, 1) for index in (0, 1, 2, 3, 5)
    ]
    journal_of(reader.journal_path(1, 0), range(4, 5))
    reader.add([rollout(index) for index in (0, 2, 4)])
    assert list(tmp_path.glob("journal-*")) == [before.journal_path(1, 1)], "it has what no part has"
    rollouts, late = found(tmp_path)
    assert len(rollouts) == 3 and late.found.responses == 3


def test_on_a_full_disk_rollouts_wait_and_are_written_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = written(tmp_path, range(2))
    journal_of(made.journal_path(1, 0), range(2, 4))

    def full(*_: Any) -> None:
        raise FULL

    monkeypatch.setattr(parts.os, "fsync", full)
    assert made.add([rollout(2), rollout(3)]) is FULL
    assert made.write() is FULL and len(made.files) == 1
    assert not list(tmp_path.glob("*.tmp")) and list(tmp_path.glob("journal-*")), "the journal has what no part has"
    monkeypatch.undo()
    assert made.add([rollout(4)]) is None
    assert found(tmp_path)[0] == [rollout(index) for index in range(5)]
    assert not list(tmp_path.glob("journal-*"))


def test_a_journal_that_cannot_be_written_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path / "journal-0-0-0", ORIGIN)
    journal.append(Response(0, array("i", [1, 2]), "stop"))
    full = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    before, journal._file = journal._file, full
    journal.append(Response(1, array("i", [1, 2]), "stop"))
    before.close()
    assert journal.error is not None and journal.error.errno == errno.ENOSPC
    journal.append(Response(2, array("i", [1, 2]), "stop"))
    assert list(read_journal(tmp_path / "journal-0-0-0", ORIGIN)) == [(0, 0)]
    assert journals.Journal(tmp_path / "no" / "such", ORIGIN).error is None
