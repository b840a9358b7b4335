"""Finds out what a path is, and opens it.

Opening reads the configuration and the list of stored tensors, not the weights: enough to refuse early what cannot be
used. The weights of an archive are unpacked when they are asked for.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemo_spin.errors import CheckpointError
from nemo_spin.model_io.huggingface.source import is_huggingface_directory, open_huggingface_directory
from nemo_spin.model_io.megatron_lm.directory import find_iteration
from nemo_spin.model_io.megatron_lm.source import open_megatron_iteration
from nemo_spin.model_io.nemo1.archive import CONFIG, is_archive
from nemo_spin.model_io.nemo1.source import is_nemo1_directory, open_nemo1_archive, open_nemo1_directory
from nemo_spin.model_io.nemo2.source import is_nemo2_directory, newest_in, open_nemo2_directory
from nemo_spin.model_io.source import CheckpointSource, understood

_EXPECTED = (
    "expected a .nemo file, an unpacked one, a NeMo 2 directory (context/, weights/), a Megatron directory (iter_*), "
    "or a Hugging Face directory (config.json, *.safetensors)"
)


@contextmanager
def open_checkpoint(path: str | Path) -> Iterator[CheckpointSource]:
    """Open a checkpoint, or the newest whole one of a run's directory; what had to be unpacked is removed on leaving.

    Raises CheckpointError, in one sentence, if there is none at `path`, or none that can be read.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        with understood(path):
            source = _open_directory(path)
        yield source
        return
    if not path.exists():
        raise CheckpointError(f"There is no checkpoint at {path}: {_EXPECTED}.")
    if not path.is_file() or not is_archive(path):
        raise CheckpointError(f"{path} is no checkpoint: it is not a tar archive; {_EXPECTED}.")
    with tempfile.TemporaryDirectory(prefix="nemo_spin_") as scratch:
        with understood(path):
            source = open_nemo1_archive(path, Path(scratch))
        yield source


def _open_directory(path: Path) -> CheckpointSource:
    if is_nemo1_directory(path):
        return open_nemo1_directory(path)
    if is_nemo2_directory(path):
        return open_nemo2_directory(path)
    if is_huggingface_directory(path):
        return open_huggingface_directory(path)
    if iteration := find_iteration(path):
        return open_megatron_iteration(iteration)
    if newest := newest_in(path):
        source = open_nemo2_directory(newest[0])
        source.chosen = newest[1]
        return source
    if (path / ".metadata").is_file() or (path / "weights").is_dir():
        raise CheckpointError(
            f"{path} holds weights, but no configuration of the model (context/model.yaml, {CONFIG}, or "
            f"the parent directory iter_* of Megatron): {_EXPECTED}."
        )
    archives = sorted(file.name for file in path.glob("*.nemo"))
    if archives:
        raise CheckpointError(f"{path} is no checkpoint, but holds {', '.join(archives[:5])}: give one of them.")
    raise CheckpointError(f"{path} is a directory, but no checkpoint: {_EXPECTED}.")
