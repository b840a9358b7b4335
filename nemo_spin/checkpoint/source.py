"""Finds out what a path is, and opens it: a NeMo 1 `.nemo` (tar or unpacked directory) or a NeMo 2 directory.

Opening reads the configuration and the list of stored tensors, not the weights: enough to refuse early what cannot be
used. The weights of an archive are unpacked when they are asked for.
"""

from __future__ import annotations

import socket
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_spin.checkpoint import nemo1, nemo2, nemo_archive, tokenizer_description
from nemo_spin.checkpoint.architecture import Architecture
from nemo_spin.checkpoint.stored import StoredTensor, check_against, read_stored_tensors
from nemo_spin.checkpoint.tokenizer_description import TokenizerDescription
from nemo_spin.errors import CheckpointError

_EXPECTED = "expected a .nemo file, an unpacked .nemo directory, or a NeMo 2 checkpoint directory (context/, weights/)"


@dataclass
class CheckpointSource:
    """An opened checkpoint. Its files may be temporary: use it inside `open_checkpoint`.

    path: as the user gave it. family: "nemo1" or "nemo2". key_prefix: before the names of the stored weights.
    config: the family's configuration, plain data. tensors: what is stored, by name without prefix.
    tokenizer: as the configuration describes it, None where it does not. files_dir: where its files are.
    """

    path: Path
    family: str
    key_prefix: str
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]
    tokenizer: TokenizerDescription | None
    files_dir: Path
    _weights_dir: Path | None = field(repr=False)

    def architecture(self, vocab_size: int | None = None) -> Architecture:
        """The model's architecture, checked against the stored tensors.

        vocab_size: number of ids of the tokenizer, which counts where the configuration gives no vocab_size.
        Raises CheckpointError for what is not supported, and where configuration and tensors contradict each other.
        """
        if self.family == "nemo1":
            where = f"{self.path}: {nemo_archive.CONFIG}"
            architecture = nemo1.architecture_from_nemo1(self.config, self.tensors, vocab_size, where)
        else:
            where = f"{self.path}: context/model.yaml"
            architecture = nemo2.architecture_from_nemo2(self.config, self.tensors, vocab_size, where)
        check_against(self.tensors, architecture, str(self.path))
        return architecture

    def weights_dir(self) -> Path:
        """The torch_dist directory. An archive is unpacked at the first call, once per machine: every process of the
        default process group, if there is one, has to call it.
        """
        if self._weights_dir is None:
            self._weights_dir = _unpack_weights(self.path, self.files_dir)
        return self._weights_dir


@contextmanager
def open_checkpoint(path: str | Path) -> Iterator[CheckpointSource]:
    """Open a checkpoint; what had to be unpacked is removed on leaving.

    Raises CheckpointError, in one sentence, if there is none at `path`, or none that can be read.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        yield _open_directory(path)
        return
    if not path.exists():
        raise CheckpointError(f"There is no checkpoint at {path}: {_EXPECTED}.")
    if not tarfile.is_tarfile(path):
        raise CheckpointError(f"{path} is no checkpoint: it is not a tar archive; {_EXPECTED}.")
    with tempfile.TemporaryDirectory(prefix="nemo_spin_") as scratch:
        yield _open_archive(path, Path(scratch))


def _open_directory(path: Path) -> CheckpointSource:
    if (path / nemo_archive.CONFIG).is_file():
        names = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
        _check_nemo1_names(names, path)
        return _nemo1_source(path, path, path / nemo_archive.WEIGHTS)
    resolved = path.resolve()
    root = resolved.parent if resolved.name in ("weights", "context") and not (path / "context").is_dir() else path
    context = root / "context"
    if context.is_dir():
        return _nemo2_source(path, root)
    if (path / "config.json").is_file():
        raise CheckpointError(
            f"{path} is a Hugging Face model: convert it to NeMo first (NeMo 2's llm.import_ckpt), and give the result."
        )
    if (path / ".metadata").is_file() or (path / "weights").is_dir():
        raise CheckpointError(
            f"{path} holds weights, but no configuration of the model (context/model.yaml or "
            f"{nemo_archive.CONFIG}): {_EXPECTED}."
        )
    raise CheckpointError(f"{path} is a directory, but no checkpoint: {_EXPECTED}.")


def _open_archive(path: Path, scratch: Path) -> CheckpointSource:
    sizes = nemo_archive.member_sizes(path)
    names = set(sizes)
    if nemo_archive.CONFIG not in names:
        raise CheckpointError(
            f"{path} is a tar archive, but no .nemo: it holds no {nemo_archive.CONFIG}; or it is truncated."
        )
    _check_nemo1_names(names, path)
    nemo_archive.unpack(path, scratch, lambda name: name == nemo_archive.CONFIG)
    artifacts = _artifacts(_read_config(scratch / nemo_archive.CONFIG, path))
    descriptions = {f"{nemo_archive.WEIGHTS}/.metadata", f"{nemo_archive.WEIGHTS}/metadata.json"}
    zarr = {name for name in names if name.endswith("/.zarray")}
    nemo_archive.unpack(
        path, scratch, lambda name: name in descriptions | zarr | artifacts or name.split("/")[0] in artifacts
    )
    prefix = f"{nemo_archive.WEIGHTS}/"
    weights = {name.removeprefix(prefix): size for name, size in sizes.items() if name.startswith(prefix)}
    source = _nemo1_source(path, scratch, scratch / nemo_archive.WEIGHTS, weights)
    source._weights_dir = None
    return source


def _check_nemo1_names(names: set[str], path: Path) -> None:
    if any(name.startswith(f"{nemo_archive.WEIGHTS}/") for name in names):
        return
    if any(name.endswith("model_weights.ckpt") for name in names):
        raise CheckpointError(
            f"{path} holds its weights in model_weights.ckpt, NeMo's layout of before megatron-core's distributed "
            "checkpoints: convert it with NeMo 1's convert_gpt_nemo_to_mcore.py script."
        )
    raise CheckpointError(
        f"{path} holds no {nemo_archive.WEIGHTS}/ directory: it is no GPT of NeMo 1, or it is incomplete."
    )


def _nemo1_source(path: Path, files: Path, weights: Path, sizes: Mapping[str, int] | None = None) -> CheckpointSource:
    config = _read_config(files / nemo_archive.CONFIG, path)
    try:
        tokenizer = tokenizer_description.from_nemo1(config, str(path))
    except CheckpointError:
        tokenizer = None
    tensors = read_stored_tensors(weights, nemo1.KEY_PREFIX, str(path), sizes)
    return CheckpointSource(path, "nemo1", nemo1.KEY_PREFIX, config, tensors, tokenizer, files, weights)


def _nemo2_source(path: Path, root: Path) -> CheckpointSource:
    description = root / "context" / "model.yaml"
    if not description.is_file():
        raise CheckpointError(
            f"{path} holds no context/model.yaml: it is incomplete, or from the first NeMo 2.0, which wrote none; "
            "re-save it with NeMo 2.1 or later."
        )
    weights = root / "weights" if (root / "weights").is_dir() else root
    try:
        config = yaml.safe_load(description.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: context/model.yaml is no YAML of plain data: {_line(error)}.") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: context/model.yaml is no mapping.")
    tokenizer = tokenizer_description.from_nemo2(config.get("tokenizer"), str(path))
    tensors = read_stored_tensors(weights, nemo2.KEY_PREFIX, str(path))
    return CheckpointSource(path, "nemo2", nemo2.KEY_PREFIX, config, tensors, tokenizer, description.parent, weights)


def _read_config(file: Path, path: Path) -> dict[str, Any]:
    """A NeMo 1 configuration as plain data; what it interpolates from keys that are not there stays as written."""
    try:
        loaded = OmegaConf.load(file)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise CheckpointError(f"{path}: {nemo_archive.CONFIG} cannot be read: {_line(error)}.") from None
    if not OmegaConf.is_dict(loaded):
        raise CheckpointError(f"{path}: {nemo_archive.CONFIG} is no mapping.")
    config = OmegaConf.to_container(loaded, resolve=False)
    for key in config:
        try:
            value = loaded[key]
            config[key] = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        except OmegaConfBaseException:
            continue
    return config


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _artifacts(config: Mapping[str, Any]) -> set[str]:
    """Names of the archive's files that the tokenizer's configuration points at."""
    node = config.get("tokenizer")
    values = node.values() if isinstance(node, Mapping) else ()
    names = {value.removeprefix("nemo:") for value in values if isinstance(value, str)}
    return (names | {Path(name).name for name in names}) - {""}


def _unpack_weights(archive: Path, scratch: Path) -> Path:
    def extract() -> Path:
        nemo_archive.unpack(archive, scratch, lambda name: name.startswith(f"{nemo_archive.WEIGHTS}/"))
        return scratch / nemo_archive.WEIGHTS

    if not dist.is_initialized():
        return extract()
    hosts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    first_here = hosts.index(hosts[dist.get_rank()])
    outcome: Path | CheckpointError | None = None
    if dist.get_rank() == first_here:
        try:
            outcome = extract()
        except CheckpointError as error:
            outcome = error
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome)
    for failure in outcomes:
        if isinstance(failure, CheckpointError):
            raise failure
    return outcomes[first_here]
