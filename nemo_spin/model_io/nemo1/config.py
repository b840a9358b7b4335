"""NeMo 1: the flat `model_config.yaml` of a `.nemo`, to an Architecture and back.

After NeMo 1's `MegatronGPTModel` (nemo_toolkit up to 2.4), in its megatron-core mode: every key that changes what
that model computes is honoured here, or refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F

from nemo_spin.errors import CheckpointError
from nemo_spin.megatron.architecture import (
    Architecture,
    gelu_tanh,
    quick_gelu,
    squared_relu,
    transformer_fields,
)
from nemo_spin.model_io.fields.supported import is_transformer_field, refuse_other_rope_scaling, refuse_unsupported
from nemo_spin.model_io.fields.types import check_field_types
from nemo_spin.model_io.stores.interface import EMBEDDING, POSITIONS, StoredTensor

KEY_PREFIX = "model."

# Gated ones end in "glu", as in NeMo. Those after the blank line are this project's; NeMo 1 has no name for them, and
# writes the tanh approximation of GELU as openai_gelu.
ACTIVATIONS = {
    "gelu": F.gelu,
    "geglu": F.gelu,
    "fast-geglu": F.gelu,
    "swiglu": F.silu,
    "fast-swiglu": F.silu,
    "reglu": F.relu,
    "fast-reglu": F.relu,
    "squared-relu": squared_relu,
    "approx-gelu": quick_gelu,

    "relu": F.relu,
    "silu": F.silu,
    "gelu-tanh": gelu_tanh,
    "tanh-geglu": gelu_tanh,
    "squared-reglu": squared_relu,
    "approx-geglu": quick_gelu,
}  # fmt: skip
NORMALIZATIONS = {
    "layernorm": "LayerNorm",
    "layernorm1p": "LayerNorm",
    "low_precision_layernorm": "LayerNorm",
    "rmsnorm": "RMSNorm",
}
# Key -> the only value (NeMo's default) with which the model computes what megatron-core's GPT does.
_ONLY = {
    "attention_type": "multihead",
    "headscale": False,
    "normalize_attention_scores": True,
    "transformer_block_type": "pre_ln",
    "apply_embedding_scaling": False,
    "hyena": None,
    "drop_layers": None,
}
# NeMo's `name` chooses the layers; in other configurations it is any name of a run.
_OTHER_SPECS = ("megatron_falcon_gpt", "megatron_gemma2", "megatron_gpt_full_te_layer_autocast", "te_gpt_hyena")
# Keys that bear the name of the TransformerConfig field that they become.
_SAME_NAME = frozenset(
    """
    num_layers hidden_size num_attention_heads num_query_groups ffn_hidden_size kv_channels layernorm_epsilon
    layernorm_zero_centered_gamma qk_layernorm rotary_interleaved softmax_scale
    """.split()
)
# Fields that NeMo 1 sets from keys of another name, whatever stands under their own.
_OVERRULED = frozenset({"normalization", "activation_func", "gated_linear_unit", "add_bias_linear", "add_qkv_bias"})


def architecture_from_nemo1(
    config: Mapping[str, Any], tensors: Mapping[str, StoredTensor], vocab_size: int | None, where: str
) -> Architecture:
    """The architecture of a NeMo 1 model.

    config: model_config.yaml as plain data. tensors: what is stored (`WeightStore.tensors`).
    vocab_size: number of ids of the tokenizer; used when the configuration gives none, None for all stored rows.
    where: names the configuration in messages. Raises CheckpointError for what cannot be represented.
    """
    check_field_types(config, where)
    _refuse(config, where)
    activation = _get(config, "activation", "gelu")
    if activation not in ACTIVATIONS:
        raise CheckpointError(
            f"{where} says activation: {activation}, which is not supported: known are {', '.join(ACTIVATIONS)}."
        )
    activation_func = gelu_tanh if _get(config, "openai_gelu", False) else ACTIVATIONS[activation]
    if activation_func is F.gelu and _get(config, "bias_activation_fusion", True):
        # megatron-core's fused bias and GELU computes the tanh approximation.
        activation_func = gelu_tanh
    normalization = str(_get(config, "normalization", "layernorm")).lower()
    if normalization not in NORMALIZATIONS:
        raise CheckpointError(
            f"{where} says normalization: {normalization}, which is not supported: known are "
            f"{', '.join(NORMALIZATIONS)}."
        )
    position = _get(config, "position_embedding_type", "learned_absolute")
    if position not in ("rope", "learned_absolute", "none"):
        raise CheckpointError(
            f"{where} says position_embedding_type: {position}, which is not supported: known are rope, "
            "learned_absolute, none."
        )
    interpolation = config.get("seq_len_interpolation_factor")
    length = _get(config, "encoder_seq_length", _get(config, "max_position_embeddings", 512))
    if position == "learned_absolute" and POSITIONS in tensors:
        length = tensors[POSITIONS].shape[0]
    rows = tensors[EMBEDDING].shape[0]
    return Architecture(
        transformer=transformer_fields(
            num_layers=_required(config, "num_layers", where),
            hidden_size=_required(config, "hidden_size", where),
            num_attention_heads=_required(config, "num_attention_heads", where),
            num_query_groups=config.get("num_query_groups"),
            ffn_hidden_size=config.get("ffn_hidden_size"),
            kv_channels=config.get("kv_channels"),
            normalization=NORMALIZATIONS[normalization],
            layernorm_epsilon=_get(config, "layernorm_epsilon", 1e-5),
            layernorm_zero_centered_gamma=normalization == "layernorm1p"
            or _get(config, "layernorm_zero_centered_gamma", False),
            activation_func=activation_func,
            gated_linear_unit=activation.endswith("glu"),
            add_bias_linear=_get(config, "bias", True),
            add_qkv_bias=_get(config, "qkv_bias", False),
            qk_layernorm=_get(config, "qk_layernorm", False),
            rotary_interleaved=_get(config, "rotary_interleaved", False),
            softmax_scale=config.get("softmax_scale"),
        ),
        vocab_rows=rows,
        vocab_size=min(config.get("vocab_size") or vocab_size or rows, rows),
        max_sequence_length=length,
        position_embedding_type=position,
        rotary_percent=float(_get(config, "rotary_percentage", 1.0)),
        rotary_base=float(_get(config, "rotary_base", 10000)),
        rope_scaling=bool(_get(config, "scale_positional_embedding", False)),
        rope_scaling_factor=float(_get(config, "scale_factor", _get(config, "rope_scaling_factor", 8.0))),
        seq_len_interpolation_factor=float(interpolation) if interpolation else None,
        share_embeddings_and_output_weights=bool(_get(config, "share_embeddings_and_output_weights", True)),
    )


def to_nemo1_config(architecture: Architecture, precision: str) -> dict[str, Any]:
    """The architecture in NeMo 1's names: `architecture_from_nemo1` reads the same one back.

    precision: "32" or "bf16", NeMo's `precision`. What NeMo 1 has no key for (vocab_size, some activations) is written
    under this project's names. Raises CheckpointError for an activation that has no name.
    """
    transformer = architecture.transformer
    activation, openai_gelu = _activation_name(architecture)
    config: dict[str, Any] = {
        "mcore_gpt": True,
        "transformer_engine": True,
        "precision": 32 if precision == "32" else precision,
        "encoder_seq_length": architecture.max_sequence_length,
        "max_position_embeddings": architecture.max_sequence_length,
        "activation": activation,
        "openai_gelu": openai_gelu,
        "bias_activation_fusion": False,
        "bias": transformer["add_bias_linear"],
        "qkv_bias": transformer["add_qkv_bias"],
        "normalization": "rmsnorm" if transformer["normalization"] == "RMSNorm" else "layernorm",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "ffn_dropout": 0.0,
        "position_embedding_type": architecture.position_embedding_type,
        "rotary_percentage": architecture.rotary_percent,
        "rotary_base": architecture.rotary_base,
        "scale_positional_embedding": architecture.rope_scaling,
        "scale_factor": architecture.rope_scaling_factor,
        "seq_len_interpolation_factor": architecture.seq_len_interpolation_factor,
        "share_embeddings_and_output_weights": architecture.share_embeddings_and_output_weights,
        "vocab_size": architecture.vocab_size,
        "override_vocab_size": architecture.vocab_rows,
        "make_vocab_size_divisible_by": 1,
        "apply_query_key_layer_scaling": False,
        "attention_type": "multihead",
        "transformer_block_type": "pre_ln",
        "normalize_attention_scores": True,
        "headscale": False,
        # NeMo 1 does not build a model without it, not even to generate.
        "optim": {"name": "fused_adam", "lr": 1e-5},
    }
    return config | {name: transformer[name] for name in sorted(_SAME_NAME)}


def _activation_name(architecture: Architecture) -> tuple[str, bool]:
    """NeMo 1's `activation` and `openai_gelu`."""
    func, gated = architecture.transformer["activation_func"], architecture.transformer["gated_linear_unit"]
    if func is gelu_tanh:
        return "geglu" if gated else "gelu", True
    names = [name for name, known in ACTIVATIONS.items() if known is func and name.endswith("glu") == gated]
    if not names:
        raise CheckpointError(f"The activation {func} has no name in a .nemo configuration.")
    return next((name for name in names if name.startswith("fast-")), names[0]), False


def _get(config: Mapping[str, Any], key: str, default: Any) -> Any:
    value = config.get(key)
    return default if value is None else value


def _required(config: Mapping[str, Any], key: str, where: str) -> Any:
    if config.get(key) is None:
        raise CheckpointError(f"{where} has no {key}: it is not the configuration of a GPT.")
    return config[key]


def _refuse(config: Mapping[str, Any], where: str) -> None:
    if not config.get("mcore_gpt"):
        raise CheckpointError(
            f"{where} does not say mcore_gpt: true: the model is older than megatron-core in NeMo; convert it with "
            "NeMo 1's convert_gpt_nemo_to_mcore.py script."
        )
    for key, only in _ONLY.items():
        if key in config and config[key] is not None and config[key] != only:
            raise CheckpointError(f"{where} says {key}: {config[key]}, which is not supported: only {only} is.")
    if config.get("scale_positional_embedding"):
        refuse_other_rope_scaling(config, where)
    if (spec := config.get("name")) in _OTHER_SPECS:
        raise CheckpointError(f"{where} says name: {spec}, a kind of layer that is not supported.")
    target = str(config.get("target") or "")
    if target and "GPT" not in target.rsplit(".", 1)[-1]:
        raise CheckpointError(f"{where} says target: {target}, which is no GPT: only GPT models can be trained.")
    for key, value in (config.get("mcore_customization_config") or {}).items():
        if value:
            raise CheckpointError(f"{where} says mcore_customization_config.{key}: {value}, which is not supported.")
    fields = {key: value for key, value in config.items() if is_transformer_field(key)}
    refuse_unsupported(fields, _SAME_NAME | _OVERRULED, where)
