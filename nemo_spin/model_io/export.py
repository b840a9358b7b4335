"""Writing a model as a checkpoint that other tools read: NeMo 1, NeMo 2, Megatron or Hugging Face.

The model is the checkpoint being converted, or the policy that was trained: one process that reads pieces of what is
stored, or all processes of a run, each with its part.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from omegaconf import OmegaConf

from nemo_spin.errors import CheckpointError, ConfigError
from nemo_spin.megatron.architecture import Architecture
from nemo_spin.model_io.files import sync
from nemo_spin.model_io.huggingface.export import (
    to_huggingface_config,
    write_huggingface_config,
    write_huggingface_weights,
)
from nemo_spin.model_io.megatron_lm.args import MEGATRON_PREFIX, launch_flags, to_args
from nemo_spin.model_io.megatron_lm.directory import iteration_directory, write_megatron_directory
from nemo_spin.model_io.megatron_lm.tokenizer import FILES
from nemo_spin.model_io.nemo1.archive import CONFIG, WEIGHTS, pack
from nemo_spin.model_io.nemo1.config import NEMO1_PREFIX, to_nemo1_config
from nemo_spin.model_io.nemo2.config import NEMO2_PREFIX
from nemo_spin.model_io.nemo2.context import describe_model, write_context
from nemo_spin.model_io.stores.interface import EMBEDDING, WeightStore
from nemo_spin.model_io.stores.torch_dist import TorchDistStore, write_torch_dist
from nemo_spin.model_io.tokenizers import NeMoTokenizer
from nemo_spin.model_io.untrusted import interpolation
from nemo_spin.model_io.weights import save_weights
from nemo_spin.runtime.kill_points import reached


class StoredWeights:
    """The weights of a checkpoint, in one process, a piece in memory at a time.

    dtype: of most of the parameters.
    """

    def __init__(self, store: WeightStore) -> None:
        self._store = store
        self.dtype = store.tensors[EMBEDDING].dtype

    def write_torch_dist(self, directory: Path, prefix: str) -> None:
        """As megatron-core's torch_dist, with `prefix` before the names."""
        write_torch_dist(self._store, directory, prefix)

    def write_huggingface(self, directory: Path, architecture: Architecture) -> None:
        """As safetensors files, under Hugging Face's names."""
        write_huggingface_weights(self._store, architecture, directory)


class LiveWeights:
    """Those of a model in its parallel layout: the same methods, which every process of the default group calls."""

    def __init__(self, gpt: GPTModel, architecture: Architecture) -> None:
        self._gpt, self._architecture = gpt, architecture
        self.dtype = next(gpt.parameters()).dtype

    def write_torch_dist(self, directory: Path, prefix: str) -> None:
        save_weights(self._gpt, directory, self._architecture.vocab_rows, prefix)

    def write_huggingface(self, directory: Path, architecture: Architecture) -> None:
        gathered = directory / ".torch_dist"
        self.write_torch_dist(gathered, NEMO1_PREFIX)
        store = TorchDistStore(gathered, NEMO1_PREFIX, str(gathered))
        write_huggingface_weights(store, architecture, directory, part=dist.get_rank(), parts=dist.get_world_size())
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(gathered)


@dataclass(frozen=True)
class Content:
    """What a checkpoint is made of.

    tokenizer: None to leave it out. nemo_config: more keys of a `.nemo`'s model_config.yaml.
    """

    architecture: Architecture
    weights: StoredWeights | LiveWeights
    tokenizer: NeMoTokenizer | None
    nemo_config: dict[str, Any] = field(default_factory=dict)

    @property
    def precision(self) -> str:
        return "bf16" if self.weights.dtype == torch.bfloat16 else "32"


def check_expressible(architecture: Architecture, dtype: torch.dtype, file_format: str) -> None:
    """Raises CheckpointError if the format cannot express the model, whose weights are stored as `dtype`."""
    describe: dict[str, Callable[[], object]] = {
        "nemo": lambda: to_nemo1_config(architecture, "32"),
        "nemo2": lambda: describe_model(architecture, dtype, None),
        "megatron": lambda: to_args(architecture, dtype),
        "hf": lambda: to_huggingface_config(architecture, dtype),
    }
    describe[file_format]()


def check_target(target: Path, file_format: str, overwrite: bool) -> None:
    """Raises ConfigError if a checkpoint of this format should not be written there."""
    if file_format == "nemo" and target.suffix != ".nemo":
        raise ConfigError(f"{target}: the name of a .nemo archive ends in .nemo; add it.")
    if file_format != "nemo" and target.suffix == ".nemo":
        raise ConfigError(
            f"{target}: this format is a directory, and the name is that of a .nemo archive; choose another."
        )
    if target.exists() and not overwrite:
        raise ConfigError(f"{target} exists already: choose another place, or replace it with --overwrite.")


def export(content: Content, target: Path, file_format: str) -> list[str]:
    """Write `content` to `target`, replacing what is there; every process that has a part of the weights calls it.

    It is built beside the target, synced and renamed: it is whole or not there. Returns what the user should know of
    the result, in sentences. Raises CheckpointError if the format cannot express the model, or nothing can be written.
    """
    check_expressible(content.architecture, content.weights.dtype, file_format)
    folder = _unfinished(target)
    try:
        if _is_main():
            _remove_leftovers(target)
            folder.mkdir(parents=True)
        _barrier()
        reached("export/begun")
        notes = _WRITERS[file_format](content, folder, target)
        _barrier()
        reached("export/written")
        if _is_main():
            _publish(folder, target, file_format)
            reached("export/published")
        _barrier()
        return notes
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"{target} cannot be written ({reason}): make room, or choose another place.") from error
    finally:
        if _is_main():
            shutil.rmtree(folder, ignore_errors=True)


def _remove_leftovers(target: Path) -> None:
    """What a process that was killed at any point of an export of `target` has left beside it."""
    replaced = _replaced(target)
    if replaced.exists() and not target.exists():
        replaced.rename(target)  # killed between its two steps, before the new one was there
    shutil.rmtree(replaced, ignore_errors=True)
    shutil.rmtree(_unfinished(target), ignore_errors=True)
    for partial in target.parent.glob(f".{target.name}.*.partial"):
        partial.unlink(missing_ok=True)


def _unfinished(target: Path) -> Path:
    return target.with_name(f".unfinished-{target.name}.d")


def _replaced(target: Path) -> Path:
    return target.with_name(f".replaced-{target.name}")


def _publish(folder: Path, target: Path, file_format: str) -> None:
    if file_format == "nemo":
        pack(folder, target)
        return
    for file in folder.rglob("*"):
        if file.is_file():
            sync(file)
    replaced = _replaced(target)
    if target.is_dir():
        # A directory cannot be replaced in one step: the old one stays until the new one is there.
        target.rename(replaced)
    folder.rename(target)
    shutil.rmtree(replaced, ignore_errors=True)


def _write_nemo(content: Content, folder: Path, target: Path) -> list[str]:
    content.weights.write_torch_dist(folder / WEIGHTS, NEMO1_PREFIX)
    if _is_main():
        config = to_nemo1_config(content.architecture, content.precision) | content.nemo_config
        # Of the run that reads it, not of the one that wrote it.
        config |= {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1}
        if content.tokenizer is not None:
            config["tokenizer"] = interpolation.escaped(content.tokenizer.save(folder))
        OmegaConf.save(OmegaConf.create(config), folder / CONFIG)
    return []


def _write_nemo2(content: Content, folder: Path, target: Path) -> list[str]:
    content.weights.write_torch_dist(folder / "weights", NEMO2_PREFIX)
    if _is_main():
        node = content.tokenizer.save_nemo2(folder / "context") if content.tokenizer else None
        write_context(folder / "context", content.architecture, content.weights.dtype, node)
    return []


def _write_megatron(content: Content, folder: Path, target: Path) -> list[str]:
    iteration = iteration_directory(folder)
    content.weights.write_torch_dist(iteration, MEGATRON_PREFIX)
    if _is_main():
        place = _save_beside(content.tokenizer, iteration) if content.tokenizer else None
        write_megatron_directory(folder, content.architecture, content.weights.dtype, place, final_root=target)
    flags, sentences = launch_flags(content.architecture)
    command = " ".join(["--load", str(target), "--use-checkpoint-args", "--finetune", *flags])
    return [f"Megatron-LM reads it with {command}.", *sentences]


def _save_beside(tokenizer: NeMoTokenizer, iteration: Path) -> tuple[str, str]:
    """The library of the tokenizer, and where in the iteration its files are now."""
    if tokenizer.library == "huggingface":
        tokenizer.save_huggingface(iteration / FILES)
        return tokenizer.library, FILES
    node = tokenizer.save_nemo2(iteration / FILES)
    return tokenizer.library, f"{FILES}/{node.get('model_path') or node['vocab_file']}"


def _write_huggingface(content: Content, folder: Path, target: Path) -> list[str]:
    architecture, tokenizer = content.architecture, content.tokenizer
    content.weights.write_huggingface(folder, architecture)
    notes = []
    if _is_main():
        ids = {}
        if tokenizer is not None:
            ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
            notes += filter(None, [tokenizer.save_huggingface(folder)])
        write_huggingface_config(architecture, content.weights.dtype, folder, **ids)
        if padding := architecture.vocab_rows - architecture.vocab_size:
            notes.append(
                f"{padding} rows of padding after the {architecture.vocab_size} of the vocabulary are left out."
            )
    return notes


def _is_main() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


_WRITERS: dict[str, Callable[[Content, Path, Path], list[str]]] = {
    "nemo": _write_nemo,
    "nemo2": _write_nemo2,
    "megatron": _write_megatron,
    "hf": _write_huggingface,
}
FORMATS = tuple(_WRITERS)
