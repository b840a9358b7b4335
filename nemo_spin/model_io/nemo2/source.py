"""Opening a NeMo 2 checkpoint: a directory with `context/` and `weights/`, or the run that holds several of them."""

from __future__ import annotations

import re
from pathlib import Path

from nemo_spin.errors import CheckpointError
from nemo_spin.model_io.nemo2.config import NEMO2_PREFIX, architecture_from_nemo2
from nemo_spin.model_io.source import CheckpointSource, described, layout_in
from nemo_spin.model_io.stores.torch_dist import TorchDistStore
from nemo_spin.model_io.tokenizers.description import from_nemo2
from nemo_spin.model_io.untrusted.plain_data import read_mapping


def is_nemo2_directory(path: Path) -> bool:
    return (_root(path) / "context").is_dir()


def open_nemo2_directory(path: Path) -> CheckpointSource:
    """A NeMo 2 directory, given itself or by its `weights/` or `context/`. Raises CheckpointError."""
    root = _root(path)
    description = root / "context" / "model.yaml"
    if not description.is_file():
        raise CheckpointError(
            f"{path} holds no context/model.yaml: it is incomplete, or from the first NeMo 2.0, which wrote none; "
            "re-save it with NeMo 2.1 or later."
        )
    if _unfinished(root).exists():
        raise CheckpointError(
            f"{path} was not written to its end, as {_unfinished(root).name} beside it says: use another checkpoint."
        )
    where = f"{path}: context/model.yaml"
    config = read_mapping(description, where)
    weights = root / "weights" if (root / "weights").is_dir() else root
    store = TorchDistStore(weights, NEMO2_PREFIX, str(path))
    return CheckpointSource(
        path,
        "nemo2",
        store.layout,
        config,
        described(from_nemo2, config.get("tokenizer"), str(path)),
        description.parent,
        trained_layout=layout_in(config.get("config") or {}),
        _store=store,
        _architecture=lambda vocab_size: architecture_from_nemo2(config, store.tensors, vocab_size, where),
    )


def newest_in(directory: Path) -> tuple[Path, str] | None:
    """The newest whole NeMo 2 checkpoint of a run, and a sentence on the choice; None where there is none.

    directory: of checkpoints, or of a run that keeps them in checkpoints/. Newest is the one with the highest step in
    its name; where not all have one, the one that was written last.
    """
    for place in (directory, directory / "checkpoints"):
        if not place.is_dir():
            continue
        candidates = [path for path in place.iterdir() if path.is_dir() and is_nemo2_directory(path)]
        whole = [path for path in candidates if (path / "weights" / ".metadata").is_file()]
        whole = [path for path in whole if not _unfinished(path).exists()]
        if whole:
            chosen = _newest(whole)
            others = f", the newest of {len(whole)} whole checkpoints in {place}" if len(whole) > 1 else ""
            left = len(candidates) - len(whole)
            incomplete = f" ({left} more {'is' if left == 1 else 'are'} incomplete)" if left else ""
            return chosen, f"{chosen.name} is used{others}{incomplete}."
    return None


def _newest(paths: list[Path]) -> Path:
    steps = {path: re.search(r"step=(\d+)", path.name) for path in paths}
    written = {path: (path / "weights" / ".metadata").stat().st_mtime for path in paths}
    if not all(steps.values()):
        return max(paths, key=lambda path: (written[path], path.name))
    return max(paths, key=lambda path: (int(steps[path][1]), written[path], path.name))


def _root(path: Path) -> Path:
    resolved = path.resolve()
    if resolved.name in ("weights", "context") and not (path / "context").is_dir():
        return resolved.parent
    return path


def _unfinished(root: Path) -> Path:
    """The marker that NeMo puts beside a checkpoint while it writes it."""
    return root.with_name(f"{root.resolve().name}-unfinished")
