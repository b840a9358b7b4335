"""Hugging Face: the weights of a directory of safetensors, one file or many, read piece by piece."""

from __future__ import annotations

import json
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nemo_spin.checkpoint.architecture import Architecture
from nemo_spin.checkpoint.contradictions import expected_tensors
from nemo_spin.checkpoint.huggingface_layout import (
    INDEX,
    OUTER,
    SINGLE,
    huggingface_shapes,
    segments,
)
from nemo_spin.checkpoint.weight_store import EMBEDDING, OUTPUT_LAYER, Region, StoredTensor
from nemo_spin.errors import CheckpointError

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_LFS = b"version https://git-lfs"


class HuggingFaceStore:
    """A WeightStore (see `weight_store`) over the safetensors files of a directory."""

    def __init__(self, directory: Path, architecture: Architecture, origin: str) -> None:
        """Reads the headers of the files, no weights.

        architecture: `architecture_from_huggingface` of the directory's config.json. origin: names the checkpoint in
        messages. Raises CheckpointError if files are missing or damaged, or contradict the architecture.
        """
        self._architecture = architecture
        self._origin = origin
        self._files = _open_files(Path(directory), origin)
        self._where = {name: file for file in self._files for name in self._files[file].keys()}  # noqa: SIM118
        self.tensors = self._checked()

    def read(self, name: str, region: Region | None = None) -> Tensor:
        """See `WeightStore.read`; only the rows of the region are read."""
        stored = self.tensors[name]
        whole = tuple(slice(0, size) for size in stored.shape)
        rows, *columns = region or whole
        begin, end, _ = rows.indices(stored.shape[0])
        parts, row = [], 0
        for segment in segments(name, self._architecture):
            start, stop = max(begin - row, 0), min(end - row, segment.rows)
            row += segment.rows
            if start < stop:
                wanted = (slice(segment.start + start, segment.start + stop), *columns)
                parts.append(self._slice(segment.name, wanted).to(stored.dtype))
        # A copy: what safetensors returns lies in the file's mapping, which the next read shares.
        return torch.cat(parts) if parts else torch.empty(stored.shape, dtype=stored.dtype)[(rows, *columns)]

    def _slice(self, name: str, region: Region) -> Tensor:
        file = self._where[name]
        try:
            return self._files[file].get_slice(name)[region]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self._origin}: {name} cannot be read from {file.name} ({_line(error)}).") from None

    def _checked(self) -> dict[str, StoredTensor]:
        """What is stored, by megatron-core's names."""
        left = dict(self._where)
        found = {}
        for name, shape in expected_tensors(self._architecture).items():
            dtypes = []
            for wanted, wanted_shape in huggingface_shapes(name, shape, self._architecture).items():
                if left.pop(wanted, None) is None:
                    raise CheckpointError(
                        f"{self._origin} holds no tensor {wanted}, which its config.json asks for"
                        f"{_reason(wanted, self._architecture)}."
                    )
                dtypes.append(self._check(wanted, wanted_shape))
            found[name] = StoredTensor(shape, reduce(torch.promote_types, dtypes))
        for name in left:
            if not _is_ignored(name, self._architecture):
                raise CheckpointError(
                    f"{self._origin} holds a tensor {name} that its config.json does not ask for"
                    f"{_reason(name, self._architecture)}: it is another kind of model than the configuration says."
                )
        return found

    def _check(self, name: str, shape: tuple[int, ...]) -> torch.dtype:
        header = self._files[self._where[name]].get_slice(name)
        if tuple(header.get_shape()) != shape:
            raise CheckpointError(
                f"{self._origin} contradicts itself: tensor {name} is {list(header.get_shape())}, but its config.json "
                f"makes it {list(shape)}{_reason(name, self._architecture)}."
            )
        if header.get_dtype() not in _DTYPES:
            raise CheckpointError(
                f"{self._origin} stores {name} as {header.get_dtype()}, which is not supported: re-save it in bf16 or "
                "fp32."
            )
        return _DTYPES[header.get_dtype()]


def _open_files(directory: Path, origin: str) -> dict[Path, Any]:
    """The safetensors files of the directory, opened."""
    again = "copy it again or use another checkpoint"
    if (directory / SINGLE).is_file():
        return {directory / SINGLE: _open(directory / SINGLE, origin)}
    if not (directory / INDEX).is_file():
        if any(directory.glob("pytorch_model*.bin")):
            raise CheckpointError(
                f"{origin} has its weights in pytorch_model.bin only, which is not read: re-save it as safetensors "
                "(transformers: from_pretrained, then save_pretrained)."
            )
        if any(directory.glob("*.safetensors")):
            raise CheckpointError(f"{origin} is incomplete: neither {SINGLE} nor {INDEX} is there; {again}.")
        raise CheckpointError(f"{origin} holds a config.json, but no weights: {SINGLE} and {INDEX} are missing.")
    try:
        weight_map = json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"]
        names = {name: Path(file).name for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{origin} is damaged: {INDEX} cannot be read; {again}.") from None
    files = {}
    for file in sorted(set(names.values())):
        if not (directory / file).is_file():
            raise CheckpointError(f"{origin} is incomplete: {file} is missing, which {INDEX} names; {again}.")
        files[directory / file] = _open(directory / file, origin)
    held = {path.name: set(opened.keys()) for path, opened in files.items()}
    for name, file in names.items():
        if name not in held[file]:
            raise CheckpointError(f"{origin} contradicts itself: {INDEX} says that {file} holds {name}; it does not.")
    return files


def _open(file: Path, origin: str) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        with open(file, "rb") as opened:
            if opened.read(len(_LFS)) == _LFS:
                raise CheckpointError(
                    f"{origin}: {file.name} is only a pointer of Git LFS to the file: fetch it with git lfs pull."
                ) from None
        raise CheckpointError(
            f"{origin}: {file.name} is truncated or damaged ({_line(error)}): copy it again or use another checkpoint."
        ) from None


def _is_ignored(name: str, architecture: Architecture) -> bool:
    """Buffers, and the copy that some write of tied embeddings: transformers does not read them either."""
    tied = architecture.share_embeddings_and_output_weights and name == OUTER[OUTPUT_LAYER]
    return tied or name.endswith("rotary_emb.inv_freq")


def _reason(name: str, architecture: Architecture) -> str:
    """The keys of config.json that decide whether a tensor exists and what its shape is."""
    transformer = architecture.transformer
    values = {
        "num_hidden_layers": transformer["num_layers"],
        "hidden_size": transformer["hidden_size"],
        "intermediate_size": transformer["ffn_hidden_size"],
        "num_attention_heads": transformer["num_attention_heads"],
        "num_key_value_heads": transformer["num_query_groups"],
        "head_dim": transformer["kv_channels"],
        "vocab_size": architecture.vocab_size,
        "tie_word_embeddings": architecture.share_embeddings_and_output_weights,
        "biases": transformer["add_bias_linear"] or transformer["add_qkv_bias"],
    }
    if name in (OUTER[EMBEDDING], OUTER[OUTPUT_LAYER]):
        keys = "vocab_size hidden_size tie_word_embeddings"
    elif name.endswith(".bias"):
        keys = "num_hidden_layers biases"
    elif "_norm." in name:
        keys = "num_hidden_layers head_dim"
    elif "self_attn" in name:
        keys = "num_hidden_layers hidden_size num_attention_heads num_key_value_heads head_dim"
    elif "mlp" in name:
        keys = "num_hidden_layers hidden_size intermediate_size"
    else:
        keys = "num_hidden_layers hidden_size"
    return " (" + ", ".join(f"{key}: {values[key]}" for key in keys.split()) + ")"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
