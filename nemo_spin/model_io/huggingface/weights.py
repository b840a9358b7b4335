"""Hugging Face: the weights of a directory of safetensors, one file or many, read piece by piece."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nemo_spin.errors import CheckpointError
from nemo_spin.megatron.architecture import Architecture
from nemo_spin.model_io.contradictions import each_expected
from nemo_spin.model_io.huggingface.layout import (
    INDEX,
    OUTER,
    SINGLE,
    huggingface_shapes,
    segments,
)
from nemo_spin.model_io.stores.interface import EMBEDDING, OUTPUT_LAYER, Region, StoredTensor
from nemo_spin.model_io.untrusted.plain_data import read_json

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_AGAIN = "copy it again or use another checkpoint"
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
        self._names: dict[str, str] = {}
        self._where: dict[str, Path] = {}
        self._headers: dict[str, tuple[tuple[int, ...], str]] = {}
        for file in _files(Path(directory), origin):
            with _opened(file, origin) as opened:
                for name in opened.keys():  # noqa: SIM118
                    header = opened.get_slice(name)
                    self._where[name] = file
                    self._headers[name] = (tuple(header.get_shape()), header.get_dtype())
        _check_index(Path(directory), self._where, origin)
        embedding, output = OUTER[EMBEDDING], OUTER[OUTPUT_LAYER]
        if architecture.share_embeddings_and_output_weights and embedding not in self._where and output in self._where:
            # Some tools store a tied weight under its other name only.
            self._names = {embedding: output}
        self.tensors = self._checked()

    def read(self, name: str, region: Region | None = None) -> Tensor:
        """See `WeightStore.read`; only the rows of the region are read."""
        stored = self.tensors[name]
        rows, *columns = region or tuple(slice(0, size) for size in stored.shape)
        begin, end, _ = rows.indices(stored.shape[0])
        parts, row = [], 0
        # Opened for this read only: the pages of a file count as this process's memory as long as it is open.
        with ExitStack() as stack:
            files: dict[Path, Any] = {}
            for segment in segments(name, self._architecture):
                start, stop = max(begin - row, 0), min(end - row, segment.rows)
                row += segment.rows
                if start >= stop:
                    continue
                stored_name = self._names.get(segment.name, segment.name)
                file = self._where[stored_name]
                if file not in files:
                    files[file] = stack.enter_context(_opened(file, self._origin))
                wanted = (slice(segment.start + start, segment.start + stop), *columns)
                parts.append(files[file].get_slice(stored_name)[wanted].to(stored.dtype))
            # torch.cat copies, always: what safetensors returns lies in the file's pages.
            return torch.cat(parts) if parts else torch.empty(stored.shape, dtype=stored.dtype)[(rows, *columns)]

    def _checked(self) -> dict[str, StoredTensor]:
        """What is stored, by megatron-core's names."""
        left = dict(self._where)
        found = {}
        for name, shape in each_expected(self._architecture):
            dtypes = []
            for wanted, wanted_shape in huggingface_shapes(name, shape, self._architecture).items():
                wanted = self._names.get(wanted, wanted)
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
        stored, dtype = self._headers[name]
        if stored != shape:
            raise CheckpointError(
                f"{self._origin} contradicts itself: tensor {name} is {list(stored)}, but its config.json makes it "
                f"{list(shape)}{_reason(name, self._architecture)}."
            )
        if dtype not in _DTYPES:
            raise CheckpointError(
                f"{self._origin} stores {name} as {dtype}, which is not supported: re-save it in bf16 or fp32."
            )
        return _DTYPES[dtype]


def _files(directory: Path, origin: str) -> list[Path]:
    """The safetensors files of the directory; of one file and many, the one, as transformers chooses."""
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    if (directory / INDEX).is_file():
        files = sorted({directory / file for file in _weight_map(directory, origin).values()})
        for file in files:
            if not file.is_file():
                raise CheckpointError(f"{origin} is incomplete: {file.name} is missing, which {INDEX} names; {_AGAIN}.")
        return files
    if any(directory.glob("pytorch_model*.bin")):
        raise CheckpointError(
            f"{origin} has its weights in pytorch_model.bin only, which is not read: re-save it as safetensors "
            "(transformers: from_pretrained, then save_pretrained)."
        )
    if any(directory.glob("*.safetensors")):
        raise CheckpointError(f"{origin} is incomplete: neither {SINGLE} nor {INDEX} is there; {_AGAIN}.")
    raise CheckpointError(f"{origin} holds a config.json, but no weights: {SINGLE} and {INDEX} are missing.")


def _weight_map(directory: Path, origin: str) -> dict[str, str]:
    """Tensor -> name of the file that holds it, as the index says."""
    try:
        index = read_json(directory / INDEX)
        return {name: Path(file).name for name, file in index["weight_map"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{origin} is damaged: {INDEX} cannot be read; {_AGAIN}.") from None


def _check_index(directory: Path, where: Mapping[str, Path], origin: str) -> None:
    if (directory / SINGLE).is_file():
        return
    for name, file in _weight_map(directory, origin).items():
        if name not in where:
            raise CheckpointError(f"{origin} contradicts itself: {INDEX} says that {file} holds {name}; it does not.")


@contextmanager
def _opened(file: Path, origin: str) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        if file.is_file() and file.open("rb").read(len(_LFS)) == _LFS:
            raise CheckpointError(
                f"{origin}: {file.name} is only a pointer of Git LFS to the file: fetch it with git lfs pull."
            ) from None
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{origin}: {file.name} is truncated or damaged ({reason}): {_AGAIN}.") from None


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
