"""From the parts that all processes wrote to a checkpoint that is there: on the first process, in the background.

The order is what makes it safe: everything is on disk before the directory gets its name, and the new checkpoint is
there before anything older is removed. A run that is killed in between leaves a whole one behind.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from nemo_spin.checkpoint import manifest
from nemo_spin.checkpoint.background import Outcome, Part
from nemo_spin.checkpoint.retention import Retention
from nemo_spin.checkpoint.run_state import RunState, stored_in, write_state
from nemo_spin.model_io.files import link_or_copy, sync
from nemo_spin.model_io.stores.sharded import ShardWriter
from nemo_spin.runtime.kill_points import reached

_UNFINISHED, _REMOVED = ".unfinished-", ".removed-"


def unfinished_directory(directory: Path, state: RunState) -> Path:
    """Where it is written. The name is for people: what counts is in state.json."""
    progress = state.progress
    return directory / f"{_UNFINISHED}iteration-{progress.iteration:03d}-step-{progress.step:07d}"


def finished_directory(unfinished: Path) -> Path:
    """What it is going to be, where nothing has that name yet."""
    return unfinished.with_name(unfinished.name.removeprefix(_UNFINISHED))


def remove_leftovers(directory: Path) -> None:
    """What killed runs were writing, or removing."""
    for path in (*directory.glob(f"{_UNFINISHED}*"), *directory.glob(f"{_REMOVED}*")):
        shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        (directory / "latest.tmp").unlink()


def prepare(unfinished: Path, state: RunState) -> None:
    """Make the directory, with the rollouts in it. Raises OSError, and leaves nothing then."""
    try:
        (unfinished / "shards").mkdir(parents=True)
        for kind, files in state.rollout_files.items():
            (unfinished / kind).mkdir()
            for file in files:
                link_or_copy(file, unfinished / kind / file.name)
    except OSError:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def publish(
    unfinished: Path,
    writer: ShardWriter,
    parts: Sequence[Part],
    state: RunState,
    retention: Retention,
    with_reference: bool,
    keep: bool,
) -> Outcome:
    """Complete the directory, give it its name, move the pointer, remove what retention does not ask for.

    Raises OSError if it cannot be completed. What fails after that is in the notes: the checkpoint is there.
    """
    directory = unfinished.parent
    stored, _ = stored_in(directory)
    here = (state.progress.step, state.progress.iteration)
    if not state.metrics:
        # The same place again, because rollouts were added: its figures are those of the first time.
        state = dataclasses.replace(state, metrics=next((s.metrics for s in stored if s.position == here), {}))
    writer.finish([part.results for part in parts])
    serial = 1 + max((s.serial for s in stored), default=0)
    write_state(unfinished, state, with_reference=with_reference, keep=keep, serial=serial)
    _seal(unfinished, {name: digest for part in parts for name, digest in part.digests.items()})
    reached("checkpoint/manifest-written")
    target = _free_name(finished_directory(unfinished))
    os.rename(unfinished, target)
    notes = []
    try:
        sync(directory)
        reached("checkpoint/renamed")
        _point_at(target)
        reached("checkpoint/pointer-moved")
        stored, _ = stored_in(directory)
        for path in retention.superfluous(stored, target):
            _remove(path)
        reached("checkpoint/old-removed")
    except OSError as error:
        notes.append(f"after {target.name} was written: {error}")
    return Outcome(target, notes=notes)


def _seal(unfinished: Path, digests: dict[str, manifest.Digest]) -> None:
    """List all files with their digests, and have everything on disk; `digests` are those that are known already."""
    directories = [path for path in unfinished.rglob("*") if path.is_dir()]
    for path in unfinished.rglob("*"):
        name = str(path.relative_to(unfinished))
        if path.is_file() and name not in digests:
            sync(path)
            digests[name] = manifest.digest_of(path)
    manifest.write_manifest(unfinished, digests)
    for path in (unfinished / manifest.FILE, *directories, unfinished):
        sync(path)


def _remove(path: Path) -> None:
    """Remove a checkpoint. It loses its name first: half of one would be taken for one that is damaged."""
    going = path.with_name(_REMOVED + path.name)
    os.rename(path, going)
    reached("checkpoint/old-set-aside")
    shutil.rmtree(going)


def _free_name(wanted: Path) -> Path:
    """A checkpoint is never replaced: one at the same place goes when the new one is there."""
    path, number = wanted, 2
    while path.exists():
        path, number = wanted.with_name(f"{wanted.name}-{number}"), number + 1
    return path


def _point_at(target: Path) -> None:
    pointer = target.parent / "latest.tmp"
    pointer.write_text(target.name + "\n", encoding="utf-8")
    sync(pointer)
    os.replace(pointer, pointer.with_name("latest"))
    sync(target.parent)
