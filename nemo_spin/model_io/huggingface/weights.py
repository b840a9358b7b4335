"""Hugging Face: the weights of a directory of safetensors, one file or many, read piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nemo_spin.errors import CheckpointError, one_line
from nemo_spin.megatron.architecture import Architecture
from nemo_spin.model_io.contradictions import check_shapes, each_expected
from nemo_spin.model_io.fields.transformer import fields_of
from nemo_spin.model_io.huggingface.config import CONFIG, KEYS
from nemo_spin.model_io.huggingface.layout import (
    INDEX,
    OUTER,
    SINGLE,
    huggingface_shapes,
    segments,
)
from nemo_spin.model_io.stores.interface import EMBEDDING, OUTPUT_LAYER, Region, StoredTensor, incomplete, refused_dtype
from nemo_spin.model_io.untrusted.plain_data import read_json

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_AGAIN = "copy it again or use another checkpoint"
_LFS = b"version https://git-lfs"


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor of a file. name: the one that it has there. dtype: as safetensors writes it."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


class HuggingFaceStore:
    """A WeightStore over the safetensors files of a directory."""

    def __init__(self, directory: Path, architecture: Architecture, origin: str) -> None:
        """Reads the headers of the files, no weights.

        architecture: `architecture_from_huggingface` of the directory's config.json. origin: names the checkpoint in
        messages. Raises CheckpointError if files are missing or damaged, or contradict the architecture.
        """
        self._architecture = architecture
        self._origin = origin
        self._stored: dict[str, _Stored] = {}
        index = None if (directory / SINGLE).is_file() else _index(directory, origin)
        files = [SINGLE] if index is None else sorted(set(index.values()))
        for file in (directory / name for name in files):
            with _opened(file, origin) as opened:
                for name in opened.keys():  # noqa: SIM118
                    header = opened.get_slice(name)
                    self._stored[name] = _Stored(file, name, tuple(header.get_shape()), header.get_dtype())
        for name, file in (index or {}).items():
            if name not in self._stored:
                raise CheckpointError(
                    f"{origin} contradicts itself: {INDEX} says that {file} holds {name}; it does not."
                )
        embedding, output = OUTER[EMBEDDING], OUTER[OUTPUT_LAYER]
        if architecture.share_embeddings_and_output_weights and embedding not in self._stored:
            # Some tools store a tied weight under its other name only.
            self._stored |= {embedding: self._stored[output]} if output in self._stored else {}
        self._check()
        self.tensors = {name: StoredTensor(shape, self._dtype(name)) for name, shape in each_expected(architecture)}

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
                piece = self._stored[segment.name]
                if piece.file not in files:
                    files[piece.file] = stack.enter_context(_opened(piece.file, self._origin))
                wanted = (slice(segment.start + start, segment.start + stop), *columns)
                parts.append(files[piece.file].get_slice(piece.name)[wanted].to(stored.dtype))
            # torch.cat copies, always: what safetensors returns lies in the file's pages.
            return torch.cat(parts) if parts else torch.empty(stored.shape, dtype=stored.dtype)[(rows, *columns)]

    def _check(self) -> None:
        architecture = self._architecture
        expected = (
            each
            for name, shape in each_expected(architecture)
            for each in huggingface_shapes(name, shape, architecture).items()
        )
        shapes = {name: each.shape for name, each in self._stored.items() if not _is_ignored(name, architecture)}
        fields = fields_of(architecture)
        quotes = {field: f"{key}: {fields[field]}" for field, key in KEYS.items()}
        quotes["add_bias_linear"] = f"biases: {fields['add_bias_linear'] or fields['add_qkv_bias']}"
        check_shapes(shapes, expected, self._origin, CONFIG, quotes)
        for name in shapes:
            if self._stored[name].dtype not in _DTYPES:
                raise refused_dtype(self._origin, name, self._stored[name].dtype)

    def _dtype(self, name: str) -> torch.dtype:
        """That of a tensor of megatron-core, whose parts may differ."""
        stored = (self._stored[segment.name].dtype for segment in segments(name, self._architecture))
        return reduce(torch.promote_types, (_DTYPES[dtype] for dtype in stored))


def _index(directory: Path, origin: str) -> dict[str, str]:
    """Tensor -> name of the file that holds it, as the index says; every one of the files is there."""
    if not (directory / INDEX).is_file():
        raise _no_weights(directory, origin)
    try:
        weight_map = read_json(directory / INDEX)["weight_map"]
        index = {name: Path(file).name for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{origin} is damaged: {INDEX} cannot be read; {_AGAIN}.") from None
    for file in sorted(set(index.values())):
        if not (directory / file).is_file():
            raise incomplete(origin, f"{file} is missing, which {INDEX} names")
    return index


def _no_weights(directory: Path, origin: str) -> CheckpointError:
    if any(directory.glob("pytorch_model*.bin")):
        return CheckpointError(
            f"{origin} has its weights in pytorch_model.bin only, which is not read: re-save it as safetensors "
            "(transformers: from_pretrained, then save_pretrained)."
        )
    if any(directory.glob("*.safetensors")):
        return incomplete(origin, f"neither {SINGLE} nor {INDEX} is there")
    return CheckpointError(f"{origin} holds a config.json, but no weights: {SINGLE} and {INDEX} are missing.")


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
        raise CheckpointError(f"{origin}: {file.name} is truncated or damaged ({one_line(error)}): {_AGAIN}.") from None


def _is_ignored(name: str, architecture: Architecture) -> bool:
    """Buffers, and the copy that some write of tied embeddings: transformers does not read them either."""
    tied = architecture.share_embeddings_and_output_weights and name == OUTER[OUTPUT_LAYER]
    return tied or name.endswith("rotary_emb.inv_freq")
