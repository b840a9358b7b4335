"""Hugging Face: `config.json` to an Architecture, for the Llama family and Nemotron.

After transformers' configuration and model classes (4.48 to 5): every key that changes what they compute is honoured
here, or refused by name. The file is read as data; nothing that it names (`auto_map`, `architectures`) is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from nemo_spin.errors import CheckpointError
from nemo_spin.megatron.architecture import Architecture, squared_relu, transformer_fields
from nemo_spin.model_io.untrusted.plain_data import read_mapping

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
BRIDGE_HINT = "import it with Megatron-Bridge (AutoBridge.import_ckpt), and give the Megatron directory that it writes"

# Field of the architecture -> key of config.json.
KEYS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "ffn_hidden_size": "intermediate_size",
    "kv_channels": "head_dim",
    "vocab_size": "vocab_size",
    "seq_length": "max_position_embeddings",
    "share_embeddings_and_output_weights": "tie_word_embeddings",
}
# What a configuration leaves out has the value of its class.
_LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 1.0,
}
_QWEN2 = _LLAMA | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA
    | {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen2": _QWEN2,
    "qwen3": _QWEN2 | {"head_dim": 128},
    "nemotron": _LLAMA
    | {
        "vocab_size": 256000,
        "hidden_size": 6144,
        "intermediate_size": 24576,
        "num_attention_heads": 48,
        "hidden_act": "relu2",
        "max_position_embeddings": 4096,
        "norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
    },
}
CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "nemotron": "NemotronForCausalLM",
}
HAVE_BIASES = ("llama", "nemotron")
LLAMA3_ROPE = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}


def read_huggingface_config(directory: Path, origin: str) -> dict[str, Any]:
    """config.json of a model's directory, as data.

    origin: names the checkpoint in messages. Raises CheckpointError if it cannot be read, or the directory holds an
    adapter.
    """
    if (directory / ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            f"{origin} holds an adapter ({ADAPTER_CONFIG}), not a whole model: merge it into its base model first "
            "(PEFT's merge_and_unload), and give the result."
        )
    return read_mapping(directory / CONFIG, f"{origin}: {CONFIG}")


def architecture_from_huggingface(config: Mapping[str, Any], where: str) -> Architecture:
    """The architecture of a Hugging Face model.

    config: config.json as plain data, in the spelling of transformers 4 or 5. where: names it in messages.
    Raises CheckpointError for what cannot be represented.
    """
    _refuse(config, where)
    model_type = config["model_type"]
    defaults = DEFAULTS[model_type]

    def get(key: str) -> Any:
        value = config.get(key)
        return defaults[key] if value is None and key != "num_key_value_heads" else value

    is_nemotron = model_type == "nemotron"
    epsilon = epsilon_key(model_type)
    sizes = {name: get(key) for name, key in KEYS.items()}
    # Unlike the others, it may be null.
    sizes["num_query_groups"] = config.get("num_key_value_heads", defaults["num_key_value_heads"])
    vocab_size = _integer(sizes.pop("vocab_size"), "vocab_size", where)
    length = _integer(sizes.pop("seq_length"), "max_position_embeddings", where)
    tied = bool(sizes.pop("share_embeddings_and_output_weights"))
    transformer = transformer_fields(
        **sizes,
        normalization="LayerNorm" if is_nemotron else "RMSNorm",
        layernorm_epsilon=_number(get(epsilon), epsilon, where),
        layernorm_zero_centered_gamma=is_nemotron,
        activation_func=_activation(model_type, str(get("hidden_act")), where),
        gated_linear_unit=not is_nemotron,
        add_bias_linear=_linear_bias(config, where),
        add_qkv_bias=model_type == "qwen2",
        qk_layernorm=model_type == "qwen3",
        rotary_interleaved=False,
        softmax_scale=None,
    )
    return Architecture(
        transformer=transformer,
        vocab_rows=vocab_size,
        vocab_size=vocab_size,
        max_sequence_length=_within_window(config, length, transformer["num_layers"], where),
        position_embedding_type="rope",
        share_embeddings_and_output_weights=tied,
        **_rope(config, get, where),
    )


def epsilon_key(model_type: str) -> str:
    return "norm_eps" if model_type == "nemotron" else "rms_norm_eps"


def _refuse(config: Mapping[str, Any], where: str) -> None:
    classes = config.get("architectures") or []
    if not isinstance(classes, list):
        raise CheckpointError(f"{where} says architectures: {ascii(classes)[:80]}, which is no list of classes.")
    if classes and not any(str(name).endswith("ForCausalLM") for name in classes):
        raise CheckpointError(
            f"{where} says architectures: {', '.join(map(str, classes))}, which is no causal language model: give one "
            "that was saved as such, LlamaForCausalLM for example."
        )
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in DEFAULTS:
        raise CheckpointError(
            f"{where} says model_type: {model_type}, which is not read directly ({', '.join(DEFAULTS)} are): "
            f"{BRIDGE_HINT}."
        )
    for key in ("quantization_config", "compression_config"):
        if config.get(key):
            node = config[key]
            method = node.get("quant_method") if isinstance(node, Mapping) else None
            raise CheckpointError(
                f"{where} has a {key}{f' ({method})' if method else ''}: quantized weights cannot be trained; give the "
                "model in bf16 or fp32."
            )


def _activation(model_type: str, name: str, where: str) -> Callable[[torch.Tensor], torch.Tensor]:
    known = {"relu2": squared_relu} if model_type == "nemotron" else {"silu": F.silu, "swish": F.silu}
    if name not in known:
        raise CheckpointError(
            f"{where} says hidden_act: {name}, which is not supported for {model_type}: only {next(iter(known))} is."
        )
    return known[name]


def _linear_bias(config: Mapping[str, Any], where: str) -> bool:
    """megatron-core has both or neither: attention_bias alone is a bias of linear_proj, but none of the MLP."""
    model_type = config["model_type"]
    attention = model_type in (*HAVE_BIASES, "qwen3") and bool(config.get("attention_bias"))
    mlp = model_type in HAVE_BIASES and bool(config.get("mlp_bias"))
    if attention != mlp:
        raise CheckpointError(
            f"{where} says attention_bias: {attention} and mlp_bias: {mlp}, which is not supported: megatron-core's "
            "GPT has both or neither."
        )
    return attention


def _within_window(config: Mapping[str, Any], length: int, num_layers: int, where: str) -> int:
    """The length, or that of sliding-window attention: up to there it is full attention."""
    defaults = DEFAULTS[config["model_type"]]
    window = config.get("sliding_window", defaults.get("sliding_window"))
    has_window = config["model_type"] == "mistral"
    if config.get("use_sliding_window") and "max_window_layers" in defaults:
        types = config.get("layer_types")
        first = config.get("max_window_layers", defaults["max_window_layers"])
        has_window = "sliding_attention" in types if types else not isinstance(first, int) or first < num_layers
    return min(length, _integer(window, "sliding_window", where)) if has_window and window is not None else length


def _rope(config: Mapping[str, Any], get: Callable[[str], Any], where: str) -> dict[str, Any]:
    """The fields of an Architecture that say how positions are rotated.

    transformers 4 writes rope_theta and rope_scaling, where "type" is an older name of "rope_type"; transformers 5
    writes rope_parameters, which holds all of it.
    """
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    node = config.get(key) or {}
    if not isinstance(node, Mapping) or any(isinstance(value, Mapping) for value in node.values()):
        raise CheckpointError(f"{where} says {key}: {node}, which is not supported: one setting for all layers is.")
    kind = node.get("rope_type") or node.get("type") or "default"
    theta = node.get("rope_theta", get("rope_theta"))
    percent = _number(node.get("partial_rotary_factor", get("partial_rotary_factor")), "partial_rotary_factor", where)
    if percent != 1 and config["model_type"] != "nemotron":
        raise CheckpointError(
            f"{where} says partial_rotary_factor: {percent}, which is not supported for {config['model_type']}."
        )
    fields: dict[str, Any] = {"rotary_base": _number(theta, "rope_theta", where), "rotary_percent": percent}
    if kind == "default":
        return fields
    if kind not in ("linear", "llama3"):
        raise CheckpointError(
            f"{where} says {key}.rope_type: {kind}, a scaling of positions that megatron-core's GPT does not compute: "
            "linear and llama3 are supported."
        )
    factor = _number(node.get("factor"), f"{key}.factor", where)
    if kind == "linear":
        return fields | {"seq_len_interpolation_factor": factor}
    for name, only in LLAMA3_ROPE.items():
        given = node.get(name)
        if given is None and name == "original_max_position_embeddings":
            given = get("max_position_embeddings")
        if given != only:
            raise CheckpointError(
                f"{where} says {key}.{name}: {given}, which is not supported: megatron-core scales rotary embeddings "
                f"with {only} only."
            )
    return fields | {"rope_scaling": True, "rope_scaling_factor": factor}


def _number(value: Any, key: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise CheckpointError(f"{where} says {key}: {value}, which is no positive number.")
    return float(value)


def _integer(value: Any, key: str, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{where} says {key}: {value}, which is no positive integer.")
    return value
