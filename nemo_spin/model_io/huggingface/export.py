"""Hugging Face: an Architecture to `config.json`, and weights to safetensors, one file or many."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from nemo_spin.errors import CheckpointError, one_line
from nemo_spin.megatron.architecture import Architecture, squared_relu
from nemo_spin.model_io.contradictions import expected_tensors
from nemo_spin.model_io.fields.transformer import fields_of
from nemo_spin.model_io.files import write_json
from nemo_spin.model_io.huggingface.config import (
    CLASSES,
    CONFIG,
    DEFAULTS,
    HAVE_BIASES,
    KEYS,
    LLAMA3_ROPE,
    epsilon_key,
)
from nemo_spin.model_io.huggingface.layout import (
    INDEX,
    SINGLE,
    Segment,
    huggingface_shapes,
    segments,
)
from nemo_spin.model_io.stores.interface import WeightStore
from nemo_spin.runtime.watchdog import beat

GENERATION_CONFIG = "generation_config.json"


def to_huggingface_config(
    architecture: Architecture,
    dtype: torch.dtype,
    *,
    bos_token_id: int | None = None,
    eos_token_id: int | list[int] | None = None,
) -> dict[str, Any]:
    """config.json of the architecture, which transformers 4.48 and later reads (Qwen3: 4.51 and later).

    dtype: of the weights. The vocabulary is written without padding rows. `architecture_from_huggingface` reads the
    same architecture back. Raises CheckpointError, by name, for what none of transformers' classes computes.
    """
    fields = fields_of(architecture)
    model_type = _model_type(architecture)
    config: dict[str, Any] = {
        "architectures": [CLASSES[model_type]],
        "model_type": model_type,
        **{key: fields[name] for name, key in KEYS.items()},
        "hidden_act": DEFAULTS[model_type]["hidden_act"],
        epsilon_key(model_type): fields["layernorm_epsilon"],
        "rope_theta": architecture.rotary_base,
        "rope_scaling": None,
        "attention_dropout": 0.0,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": None,
        "use_cache": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if architecture.rope_scaling:
        config["rope_scaling"] = {"rope_type": "llama3", "factor": architecture.rope_scaling_factor, **LLAMA3_ROPE}
    elif architecture.seq_len_interpolation_factor:
        config["rope_scaling"] = {"rope_type": "linear", "factor": architecture.seq_len_interpolation_factor}
    if model_type in HAVE_BIASES:
        config |= dict.fromkeys(("attention_bias", "mlp_bias"), fields["add_bias_linear"])
    elif model_type == "qwen3":
        config["attention_bias"] = False
    if model_type == "mistral" or model_type.startswith("qwen"):
        config["sliding_window"] = None
    if model_type.startswith("qwen"):
        config["use_sliding_window"] = False
    if model_type == "nemotron":
        config["partial_rotary_factor"] = architecture.rotary_percent
    return config


def write_huggingface_config(
    architecture: Architecture,
    dtype: torch.dtype,
    directory: Path,
    *,
    bos_token_id: int | None = None,
    eos_token_id: int | list[int] | None = None,
) -> None:
    """Write config.json, and generation_config.json, which tells servers where a response ends.

    See `to_huggingface_config`. directory: exists. Raises CheckpointError.
    """
    ids = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
    write_json(directory / CONFIG, to_huggingface_config(architecture, dtype, **ids))
    write_json(directory / GENERATION_CONFIG, {key: value for key, value in ids.items() if value is not None})


def _model_type(architecture: Architecture) -> str:
    """The model_type whose class computes the architecture."""
    transformer = architecture.transformer
    rms_norm = transformer["normalization"] == "RMSNorm"
    biases, gated = transformer["add_bias_linear"], transformer["gated_linear_unit"]
    scale = transformer["softmax_scale"]
    problems = {
        f"position_embedding_type {architecture.position_embedding_type}": (
            architecture.position_embedding_type != "rope"
        ),
        "rotary_interleaved": transformer["rotary_interleaved"],
        f"softmax_scale {scale}": scale is not None and not math.isclose(scale, transformer["kv_channels"] ** -0.5),
        "rope_scaling together with seq_len_interpolation_factor": (
            architecture.rope_scaling and architecture.seq_len_interpolation_factor
        ),
    }
    is_nemotron = not rms_norm and not gated and transformer["activation_func"] is squared_relu
    if is_nemotron:
        problems |= {
            "LayerNorm without zero-centered gamma": not transformer["layernorm_zero_centered_gamma"],
            "qk_layernorm": transformer["qk_layernorm"],
            "add_qkv_bias without add_bias_linear": transformer["add_qkv_bias"] and not biases,
        }
    else:
        activation = getattr(transformer["activation_func"], "__name__", str(transformer["activation_func"]))
        problems |= {
            f"normalization {transformer['normalization']}": not rms_norm,
            f"activation {activation}": transformer["activation_func"] is not F.silu,
            "a feed-forward layer without a gate": not gated,
            "layernorm_zero_centered_gamma": transformer["layernorm_zero_centered_gamma"],
            f"rotary_percent {architecture.rotary_percent}": architecture.rotary_percent != 1,
            "qk_layernorm with biases": transformer["qk_layernorm"] and (biases or transformer["add_qkv_bias"]),
        }
    for what, found in problems.items():
        if found:
            raise CheckpointError(
                f"The model has {what}, which no Hugging Face class that is written here computes: write a Megatron "
                "directory instead, and export that with Megatron-Bridge (AutoBridge.export_ckpt)."
            )
    if is_nemotron:
        return "nemotron"
    if transformer["qk_layernorm"]:
        return "qwen3"
    if transformer["add_qkv_bias"] and not biases:
        return "qwen2"
    # transformers refuses a Llama whose hidden size its number of heads does not divide; Mistral computes the same.
    return "llama" if biases or transformer["hidden_size"] % transformer["num_attention_heads"] == 0 else "mistral"


def write_huggingface_weights(
    store: WeightStore,
    architecture: Architecture,
    directory: Path,
    *,
    max_shard_bytes: int = 2 * 2**30,
    part: int = 0,
    parts: int = 1,
) -> None:
    """Write a model's weights as safetensors files and their index, in the dtypes that they are stored in.

    architecture: of `store`, and one that `to_huggingface_config` accepts. directory: exists.
    max_shard_bytes: of a file, unless one tensor of megatron-core is larger. part, parts: this call writes every
    `parts`-th file from number `part` on, the first one also the index; so several processes can share the work.
    No more than one file's tensors are in memory at a time. Raises CheckpointError if the store cannot be read, or
    a file cannot be written.
    """
    shards, sizes = _plan(store, architecture, max_shard_bytes)
    count = len(shards)
    names = [SINGLE] if count == 1 else [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    for number in range(part, count, parts):
        tensors: dict[str, Tensor] = {}
        for name in shards[number]:
            beat()
            tensors |= _split(store.read(name), segments(name, architecture))
        _save(tensors, directory / names[number])
    if part == 0 and count > 1:
        weight_map = {
            segment.name: file
            for file, shard in zip(names, shards, strict=True)
            for name in shard
            for segment in segments(name, architecture)
        }
        write_json(directory / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    try:
        file.touch()
        mode = file.stat().st_mode
        save_file(tensors, file, metadata={"format": "pt"})
        # safetensors makes files that only their owner can read, whatever the umask says.
        file.chmod(mode)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} cannot be written ({one_line(error)}): make room, or choose another place."
        ) from None


def _plan(
    store: WeightStore, architecture: Architecture, max_shard_bytes: int
) -> tuple[list[list[str]], Mapping[str, int]]:
    """Which tensors of megatron-core go into which file, and how many bytes they make there."""
    sizes = {}
    for name, shape in expected_tensors(architecture).items():
        pieces = huggingface_shapes(name, shape, architecture).values()
        sizes[name] = sum(map(math.prod, pieces)) * store.tensors[name].dtype.itemsize
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards, sizes


def _split(tensor: Tensor, layout: list[Segment]) -> dict[str, Tensor]:
    """The Hugging Face tensors that a tensor of megatron-core consists of."""
    parts: dict[str, list[Tensor]] = defaultdict(list)
    row = 0
    for segment in layout:
        parts[segment.name].append(tensor[row : row + segment.rows])
        row += segment.rows
    return {name: torch.cat(rows) for name, rows in parts.items()}
