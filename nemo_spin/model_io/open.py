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
from nemo_spin.model_io.huggingface import source as huggingface_source
from nemo_spin.model_io.megatron_lm import source as megatron_source
from nemo_spin.model_io.megatron_lm.directory import find_iteration
from nemo_spin.model_io.nemo1 import archive as nemo_archive
from nemo_spin.model_io.nemo1 import source as nemo1_source
from nemo_spin.model_io.nemo2 import source as nemo2_source
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
    if not path.is_file() or not nemo_archive.is_archive(path):
        raise CheckpointError(f"{path} is no checkpoint: it is not a tar archive; {_EXPECTED}.")
    with tempfile.TemporaryDirectory(prefix="nemo_spin_") as scratch:
        with understood(path):
            source = nemo1_source.open_archive(path, Path(scratch))
        yield source


def _open_directory(path: Path) -> CheckpointSource:
    if nemo1_source.is_nemo1_directory(path):
        return nemo1_source.open_directory(path)
    if nemo2_source.is_nemo2_directory(path):
        return nemo2_source.open_directory(path)
    if huggingface_source.is_huggingface_directory(path):
        return huggingface_source.open_directory(path)
    if iteration := find_iteration(path):
        return megatron_source.open_iteration(iteration)
    if newest := nemo2_source.newest_in(path):
        source = nemo2_source.open_directory(newest[0])
        source.chosen = newest[1]
        return source
    if (path / ".metadata").is_file() or (path / "weights").is_dir():
        raise CheckpointError(
            f"{path} holds weights, but no configuration of the model (context/model.yaml, {nemo_archive.CONFIG}, or "
            f"the parent directory iter_* of Megatron): {_EXPECTED}."
        )
    archives = sorted(file.name for file in path.glob("*.nemo"))
    if archives:
        raise CheckpointError(f"{path} is no checkpoint, but holds {', '.join(archives[:5])}: give one of them.")
    raise CheckpointError(f"{path} is a directory, but no checkpoint: {_EXPECTED}.")
