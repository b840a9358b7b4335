"""What a torch_dist directory holds, from its `.metadata` alone: names, shapes and dtypes of tensors, no weights.

`.metadata` is a pickle. It is read with an allow-list of the classes that torch and megatron-core write there, so
that a file made to run code is refused before anything else opens it.
"""

from __future__ import annotations

import enum
import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from nemo_spin.checkpoint.architecture import Architecture, layer_tensors, outer_tensors
from nemo_spin.errors import CheckpointError

EMBEDDING = "embedding.word_embeddings.weight"
POSITIONS = "embedding.position_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"
LAYERS = "decoder.layers."
_QK_NORMS = tuple(f"{which}_layernorm.{kind}" for which in "qk" for kind in ("weight", "bias"))

_ALLOWED_MODULES = ("torch.distributed.checkpoint.", "torch.distributed._shard.", "megatron.core.dist_checkpointing.")
_ALLOWED_NAMES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
}


def _enum_member(owner: type, name: str) -> Any:
    """Stands in for getattr, by which Python 3.11 pickles enum members."""
    if not (isinstance(owner, type) and issubclass(owner, enum.Enum)):
        raise pickle.UnpicklingError(f"getattr of {owner!r}")
    return owner[name]


def _is_record(found: Any) -> bool:
    """Whether it is a class that holds data only. megatron-core has empty stand-ins for those of older releases."""
    return (
        isinstance(found, type)
        and found.__module__.startswith(_ALLOWED_MODULES)
        and (is_dataclass(found) or issubclass(found, enum.Enum) or found.__init__ is object.__init__)
    )


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        found = None
        if (module, name) in _ALLOWED_NAMES or module.startswith(_ALLOWED_MODULES):
            found = super().find_class(module, name)
        # Inside the allowed modules only plain records: not functions, not what these modules import.
        if (module, name) in _ALLOWED_NAMES or _is_record(found):
            return found
        raise pickle.UnpicklingError(f"{module}.{name}")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    shape: tuple[int, ...]
    dtype: torch.dtype


def check_backend(weights_dir: Path, origin: str) -> None:
    """Raises CheckpointError unless the directory is a whole torch_dist checkpoint.

    origin: the path that the user gave, for the message.
    """
    resave = "re-save it as torch_dist (in NeMo 1 with dist_ckpt_format: torch_dist)"
    if not (weights_dir / ".metadata").is_file():
        if any(weights_dir.glob("*/.zarray")):
            raise CheckpointError(
                f"{origin} is in the zarr layout, which megatron-core no longer reads: {resave} with the NeMo release "
                "that wrote it."
            )
        raise CheckpointError(
            f"{origin} is incomplete: {weights_dir.name}/.metadata is missing, so it is not known which tensors it "
            "holds; copy it again or use another checkpoint."
        )
    description = weights_dir / "metadata.json"
    try:
        backend = json.loads(description.read_text())["sharded_backend"]
    except FileNotFoundError:
        raise CheckpointError(
            f"{origin} is incomplete: {weights_dir.name}/metadata.json is missing; copy it again or use another "
            "checkpoint."
        ) from None
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"{origin} is damaged: {weights_dir.name}/metadata.json does not name its sharded_backend."
        ) from None
    if backend != "torch_dist":
        raise CheckpointError(f"{origin} stores its weights as {backend}, which is not supported: {resave}.")


def read_stored_tensors(
    weights_dir: Path, prefix: str, origin: str, sizes: Mapping[str, int] | None = None
) -> dict[str, StoredTensor]:
    """Name (without `prefix`) -> shape and dtype of each stored weight; optimizer and `_extra_state` are left out.

    sizes: bytes of each file of the directory, where it is not unpacked yet. Raises CheckpointError if the directory
    is no torch_dist checkpoint, its `.metadata` cannot be read, or files are missing or cut off.
    """
    check_backend(weights_dir, origin)
    try:
        with open(weights_dir / ".metadata", "rb") as file:
            metadata = _MetadataUnpickler(file).load()
        entries = metadata.state_dict_metadata
    except Exception as error:
        raise CheckpointError(
            f"{origin}: {weights_dir.name}/.metadata cannot be read ({type(error).__name__}: {error}): it is damaged, "
            "or written by a torch or megatron-core newer than this one."
        ) from None
    if sizes is None:
        sizes = {file.name: file.stat().st_size for file in weights_dir.iterdir() if file.is_file()}
    _check_files(metadata.storage_data or {}, sizes, f"{origin} is incomplete: {weights_dir.name}")
    tensors = {
        key.removeprefix(prefix): StoredTensor(tuple(entry.size), entry.properties.dtype)
        for key, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata) and key.startswith(prefix)
    }
    tensors = {key: tensor for key, tensor in tensors.items() if not key.endswith("_extra_state")}
    if EMBEDDING not in tensors:
        names = ", ".join(sorted(entries)[:3]) or "nothing"
        raise CheckpointError(
            f"{origin} holds no {prefix}{EMBEDDING} (it holds {names}, ...): it is not a whole GPT; if it holds "
            "adapters, merge them into their base model first."
        )
    return tensors


def _check_files(storage: Mapping[Any, Any], sizes: Mapping[str, int], incomplete: str) -> None:
    """storage: what `.metadata` says of where in which file each piece lies."""
    for piece in storage.values():
        name, end = piece.relative_path, piece.offset + piece.length
        if name not in sizes:
            raise CheckpointError(f"{incomplete}/{name} is missing; copy it again or use another checkpoint.")
        if sizes[name] < end:
            raise CheckpointError(
                f"{incomplete}/{name} is truncated ({sizes[name]} bytes, at least {end} are needed); copy it again or "
                "use another checkpoint."
            )


def layers_are_stacked(tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether layers are stacked on axis 0 (decoder.layers.mlp...), not stored one by one (decoder.layers.0.mlp...)."""
    return not any(key.removeprefix(LAYERS)[0].isdigit() for key in tensors if key.startswith(LAYERS))


def check_against(tensors: Mapping[str, StoredTensor], architecture: Architecture, origin: str) -> None:
    """Raises CheckpointError, naming tensor and configuration, where the stored tensors contradict the architecture."""
    layers = architecture.transformer["num_layers"]
    expected = outer_tensors(architecture)
    for name, shape in layer_tensors(architecture.transformer).items():
        if layers_are_stacked(tensors):
            expected[LAYERS + name] = (layers, *shape)
        else:
            expected |= {f"{LAYERS}{index}.{name}": shape for index in range(layers)}
    for key, shape in expected.items():
        if key not in tensors:
            raise CheckpointError(
                f"{origin} holds no tensor {key}, which its configuration asks for{_reason(key, architecture)}."
            )
        if tensors[key].shape != shape:
            raise CheckpointError(
                f"{origin} contradicts itself: tensor {key} is {list(tensors[key].shape)}, but its configuration makes "
                f"it {list(shape)}{_reason(key, architecture)}."
            )
        if not tensors[key].dtype.is_floating_point or tensors[key].dtype.itemsize < 2:
            raise CheckpointError(
                f"{origin} stores {key} as {tensors[key].dtype}, which is not supported: re-save it in bf16 or fp32."
            )
    for key in tensors:
        if key not in expected:
            raise CheckpointError(
                f"{origin} holds a tensor {key} that its configuration does not ask for{_reason(key, architecture)}: "
                "it is another kind of model than the configuration says."
            )


def _reason(key: str, architecture: Architecture) -> str:
    """The keys of the configuration that decide whether a tensor exists and what its shape is."""
    transformer = architecture.transformer
    if key in (EMBEDDING, OUTPUT_LAYER):
        fields = {
            "share_embeddings_and_output_weights": architecture.share_embeddings_and_output_weights,
            "hidden_size": transformer["hidden_size"],
        }
    elif key == POSITIONS:
        fields = {
            "position_embedding_type": architecture.position_embedding_type,
            "hidden_size": transformer["hidden_size"],
        }
    elif "norm" in key:
        names = ["num_layers", "hidden_size", "normalization"] + (["qk_layernorm"] if key.endswith(_QK_NORMS) else [])
        fields = {name: transformer[name] for name in names}
    elif "linear_qkv" in key or "linear_proj" in key:
        names = ["num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"]
        fields = {name: transformer[name] for name in names}
    elif "linear_fc" in key:
        names = ["num_layers", "hidden_size", "ffn_hidden_size", "gated_linear_unit"]
        fields = {name: transformer[name] for name in names}
    else:
        return ""
    if key.endswith(".bias") and "norm" not in key:
        fields = {name: transformer[name] for name in ("num_layers", "add_bias_linear", "add_qkv_bias")}
    return " (" + ", ".join(f"{name}: {value}" for name, value in fields.items()) + ")"
