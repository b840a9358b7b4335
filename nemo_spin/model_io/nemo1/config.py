"""NeMo 1: the flat `model_config.yaml` of a `.nemo`, to an Architecture and back.

After NeMo 1's `MegatronGPTModel` (nemo_toolkit up to 2.4), in its megatron-core mode: every key that changes what
that model computes is honoured here, or refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F

from nemo_spin.errors import CheckpointError
from nemo_spin.megatron.architecture import Architecture, gelu_tanh, quick_gelu, squared_relu
from nemo_spin.model_io.fields.supported import is_transformer_field, refuse_other_rope_scaling, refuse_unsupported
from nemo_spin.model_io.fields.transformer import architecture_from_fields, fields_of, one_of
from nemo_spin.model_io.fields.types import check_field_types
from nemo_spin.model_io.stores.interface import StoredTensor

NEMO1_PREFIX = "model."

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
# Keys that bear the name of the field that they become.
_SAME_NAME = frozenset(
    """
    num_layers hidden_size num_attention_heads num_query_groups ffn_hidden_size kv_channels layernorm_epsilon
    layernorm_zero_centered_gamma qk_layernorm rotary_interleaved softmax_scale
    """.split()
)
_ALSO_WRITTEN = frozenset(
    """
    position_embedding_type rotary_base seq_len_interpolation_factor share_embeddings_and_output_weights vocab_size
    """.split()
)
# Fields that NeMo 1 sets from keys of another name, whatever stands under their own.
_OVERRULED = frozenset({"normalization", "activation_func", "gated_linear_unit", "add_bias_linear", "add_qkv_bias"})
# What a key is that is not there, or null.
_DEFAULTS = {
    "activation": "gelu",
    "bias": True,
    "bias_activation_fusion": True,
    "encoder_seq_length": 512,
    "layernorm_epsilon": 1e-5,
    "normalization": "layernorm",
    "position_embedding_type": "learned_absolute",
    "share_embeddings_and_output_weights": True,
}


def architecture_from_nemo1(
    config: Mapping[str, Any], tensors: Mapping[str, StoredTensor], vocab_size: int | None, where: str
) -> Architecture:
    """The architecture of a NeMo 1 model.

    config: model_config.yaml as plain data. See `architecture_from_fields` for the other arguments and errors.
    """
    check_field_types(config, where)
    _refuse(config, where)
    given = {key: value for key, value in config.items() if value is not None}
    length = given.get("max_position_embeddings", _DEFAULTS["encoder_seq_length"])
    given = _DEFAULTS | {"encoder_seq_length": length} | given
    given["normalization"] = given["normalization"].lower()
    activation = one_of(given, "activation", ACTIVATIONS, where)
    normalization = one_of(given, "normalization", NORMALIZATIONS, where)
    fields = {name: given[name] for name in _SAME_NAME if name in given} | {
        "activation_func": gelu_tanh if given.get("openai_gelu") else ACTIVATIONS[activation],
        "bias_activation_fusion": given["bias_activation_fusion"],
        "gated_linear_unit": activation.endswith("glu"),
        "normalization": NORMALIZATIONS[normalization],
        "add_bias_linear": given["bias"],
        "add_qkv_bias": given.get("qkv_bias", False),
        "position_embedding_type": given["position_embedding_type"],
        "rotary_percent": given.get("rotary_percentage"),
        "rotary_base": given.get("rotary_base"),
        "rope_scaling": given.get("scale_positional_embedding"),
        "rope_scaling_factor": given.get("scale_factor", given.get("rope_scaling_factor")),
        "seq_len_interpolation_factor": given.get("seq_len_interpolation_factor"),
        "seq_length": given["encoder_seq_length"],
        "share_embeddings_and_output_weights": given["share_embeddings_and_output_weights"],
        "vocab_size": given.get("vocab_size"),
    }
    if normalization == "layernorm1p":
        fields["layernorm_zero_centered_gamma"] = True
    return architecture_from_fields(fields, tensors, vocab_size, where)


def to_nemo1_config(architecture: Architecture, precision: str) -> dict[str, Any]:
    """The architecture in NeMo 1's names: `architecture_from_nemo1` reads the same one back.

    precision: "32" or "bf16", NeMo's `precision`. What NeMo 1 has no key for (vocab_size, some activations) is written
    under this project's names. Raises CheckpointError for an activation that has no name.
    """
    fields = fields_of(architecture)
    activation, openai_gelu = _activation_name(fields["activation_func"], fields["gated_linear_unit"])
    return {
        "mcore_gpt": True,
        "transformer_engine": True,
        "precision": 32 if precision == "32" else precision,
        "encoder_seq_length": fields["seq_length"],
        "max_position_embeddings": fields["seq_length"],
        "activation": activation,
        "openai_gelu": openai_gelu,
        "bias_activation_fusion": False,
        "bias": fields["add_bias_linear"],
        "qkv_bias": fields["add_qkv_bias"],
        "normalization": fields["normalization"].lower(),
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "ffn_dropout": 0.0,
        "rotary_percentage": fields["rotary_percent"],
        "scale_positional_embedding": fields["rope_scaling"],
        "scale_factor": fields["rope_scaling_factor"],
        "override_vocab_size": architecture.vocab_rows,
        "make_vocab_size_divisible_by": 1,
        "apply_query_key_layer_scaling": False,
        "attention_type": "multihead",
        "transformer_block_type": "pre_ln",
        "normalize_attention_scores": True,
        "headscale": False,
        # NeMo 1 does not build a model without it, not even to generate.
        "optim": {"name": "fused_adam", "lr": 1e-5},
        **{name: fields[name] for name in sorted(_SAME_NAME | _ALSO_WRITTEN)},
    }


def _activation_name(func: Any, gated: bool) -> tuple[str, bool]:
    """NeMo 1's `activation` and `openai_gelu`."""
    if func is gelu_tanh:
        return "geglu" if gated else "gelu", True
    names = [name for name, known in ACTIVATIONS.items() if known is func and name.endswith("glu") == gated]
    if not names:
        raise CheckpointError(f"The activation {func} has no name in a .nemo configuration.")
    return next((name for name in names if name.startswith("fast-")), names[0]), False


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
