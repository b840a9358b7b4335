"""state.json: what a checkpoint holds beside tensors, and which checkpoints there are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from nemo_spin.checkpoint.manifest import fault_of, read_manifest
from nemo_spin.errors import CheckpointError
from nemo_spin.model_io.files import write_json
from nemo_spin.runtime.progress import Progress

FILE = "state.json"
FORMAT = 2
_TYPES = {"settings": dict, "metrics": dict, "with_reference": bool, "keep": bool, "serial": int, "ref_id": str}


@dataclass
class RunState:
    """What a run hands to a checkpoint, and gets back from it, beside tensors.

    settings: those that must match when a run resumes from the checkpoint, if that is within an iteration.
    metrics: of the last step.
    rollout_files: by kind, which is the name of a directory: `rollouts` and `held_out` of the iteration under way, and
        what it replays of earlier ones.
    ref_id: names the weights of that iteration's reference.
    unwritten: why some of the rollouts are in no file, where they are not: then there can be no checkpoint.
    """

    progress: Progress
    settings: dict[str, int | str]
    metrics: dict[str, float] = field(default_factory=dict)
    rollout_files: dict[str, list[Path]] = field(default_factory=dict)
    ref_id: str = ""
    unwritten: OSError | None = None


@dataclass(frozen=True)
class Stored:
    """A checkpoint that is there, by its state.json.

    with_reference: whether the reference is among the tensors. keep: it stays for good. serial: how many checkpoints
    of the run were written before it. ref_id: names the reference's weights.
    """

    path: Path
    progress: Progress
    settings: dict[str, int | str]
    metrics: dict[str, float]
    with_reference: bool
    keep: bool
    serial: int
    ref_id: str

    @property
    def position(self) -> tuple[int, int]:
        """Where in the run it stands."""
        return self.progress.step, self.progress.iteration

    @property
    def age(self) -> tuple[int, int, int]:
        """Larger for newer ones. Of two that stand at the same place, the one that was written later is newer."""
        return *self.position, self.serial


def write_state(directory: Path, state: RunState, **more: bool | int) -> None:
    """more: `with_reference`, `keep` and `serial` of `Stored`."""
    content = {"progress": state.progress.state_dict(), "identity": state.settings, "metrics": state.metrics}
    write_json(directory / FILE, {"format": FORMAT, **content, "ref_id": state.ref_id, **more})


def read_state(path: Path) -> Stored:
    """The state as it was written: it is compared with the manifest, because it decides which checkpoint is newest.

    Raises CheckpointError, which says what is wrong with the file.
    """
    try:
        stored = json.loads((path / FILE).read_text(encoding="utf-8"))
        if stored.get("format") == 1:
            raise CheckpointError(f"{FILE} is of a version of nemo_spin that wrote no checksums: go on with that one")
        if stored.get("format") != FORMAT:
            raise CheckpointError(f"{FILE} has format {stored.get('format')}, and this version reads {FORMAT}")
        progress = Progress.from_state_dict(stored["progress"])
        values = {name: stored["identity" if name == "settings" else name] for name in _TYPES}
        is_sound = all(type(values[name]) is kind for name, kind in _TYPES.items())
        is_sound = is_sound and all(isinstance(value, int | float) for value in values["metrics"].values())
    except FileNotFoundError:
        raise CheckpointError(f"{FILE} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{FILE} cannot be read ({error.strerror})") from None
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        raise CheckpointError(f"{FILE} is damaged") from None
    if not is_sound:
        raise CheckpointError(f"{FILE} is damaged")
    digests = read_manifest(path)
    if fault := fault_of(path, FILE, digests[FILE]) if FILE in digests else f"{FILE} is not in the manifest":
        raise CheckpointError(fault)
    return Stored(path, progress, **values)


def stored_in(directory: Path) -> tuple[list[Stored], dict[Path, str]]:
    """The checkpoints in a directory, the newest first, and what is wrong with those whose state cannot be read."""
    found, faults = [], {}
    for path in _candidates(directory):
        try:
            found.append(read_state(path))
        except CheckpointError as error:
            faults[path] = str(error)
    return sorted(found, key=lambda stored: stored.age, reverse=True), faults


def pointed_at(directory: Path) -> str | None:
    """The name in the file `latest`, which a run moves last of all; None where there is no such file."""
    try:
        return (directory / "latest").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _candidates(directory: Path) -> Iterator[Path]:
    """By name, and what `latest` names: a damaged checkpoint may lack any file."""
    for path in sorted(directory.iterdir()) if directory.is_dir() else []:
        if path.is_dir() and (path.name.startswith("iteration-") or path.name == pointed_at(directory)):
            yield path
