"""The fields that NeMo 2, Megatron-Bridge and, translated, Megatron-LM describe a GPT with, to an Architecture.

They are those of megatron-core's TransformerConfig and GPTModel. Callables stand there as `{_target_: dotted.name}`,
which is read as data: nothing that a configuration names is ever imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from nemo_spin.errors import CheckpointError
from nemo_spin.megatron.architecture import (
    Architecture,
    gelu_tanh,
    quick_gelu,
    squared_relu,
    transformer_fields,
)
from nemo_spin.model_io.fields.supported import refuse_other_rope_scaling, refuse_unsupported
from nemo_spin.model_io.fields.types import check_field_types
from nemo_spin.model_io.stores.interface import EMBEDDING, POSITIONS, StoredTensor

# Last part of the name -> function; the name must be one of torch's, NeMo's or megatron's.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "erf_gelu": F.gelu,
    "relu": F.relu,
    "squared_relu": squared_relu,
    "openai_gelu": gelu_tanh,
    "fast_gelu": gelu_tanh,
    "gelu_impl": gelu_tanh,
    "quick_gelu": quick_gelu,
}
_LAYER_SPECS = frozenset({"default_layer_spec", "transformer_engine_layer_spec", "local_layer_spec"})

_REQUIRED = """
    num_layers hidden_size num_attention_heads normalization layernorm_epsilon activation_func gated_linear_unit
    add_bias_linear position_embedding_type share_embeddings_and_output_weights seq_length
    """.split()
_USED = frozenset(
    [
        *_REQUIRED,
        *"""
        _target_ num_query_groups ffn_hidden_size kv_channels layernorm_zero_centered_gamma add_qkv_bias qk_layernorm
        rotary_interleaved rotary_percent rotary_base seq_len_interpolation_factor softmax_scale vocab_size
        transformer_layer_spec rope_scaling rope_scaling_factor scale_factor low_freq_factor high_freq_factor
        old_context_len
        """.split(),
    ]
)


def architecture_from_fields(
    config: Mapping[str, Any],
    tensors: Mapping[str, StoredTensor],
    vocab_size: int | None,
    where: str,
    section: str = "",
) -> Architecture:
    """The architecture that the fields describe.

    config: field -> value. tensors: what is stored, layers one by one. vocab_size: number of ids of the tokenizer; used
    when the configuration gives none, None for all stored rows. where: names the configuration in messages; section:
    before the name of a field there ("config."). Raises CheckpointError for what cannot be represented.
    """
    for name in _REQUIRED:
        if config.get(name) is None:
            raise CheckpointError(f"{where} has no {section}{name}: it is not the whole configuration of a GPT.")
    check_field_types(config, where)
    refuse_unsupported(config, _USED, where)
    if config.get("transformer_layer_spec"):
        spec = target_of(config["transformer_layer_spec"])
        if spec.rsplit(".", 1)[-1] not in _LAYER_SPECS:
            raise CheckpointError(f"{where} says transformer_layer_spec: {spec}, layers that are not supported.")
    activation_func = _activation(config["activation_func"], where)
    if activation_func is F.gelu and (config.get("bias_activation_fusion") or config.get("use_te_activation_func")):
        # megatron-core's fused bias and GELU, like TransformerEngine's GELU, computes the tanh approximation.
        activation_func = gelu_tanh
    position = _one_of(config, "position_embedding_type", ("rope", "learned_absolute", "none"), where)
    length = config["seq_length"]
    if position == "learned_absolute" and POSITIONS in tensors:
        length = tensors[POSITIONS].shape[0]
    rope_scaling, rope_scaling_factor = _rope_scaling(config, where)
    interpolation = config.get("seq_len_interpolation_factor")
    rows = tensors[EMBEDDING].shape[0]
    return Architecture(
        transformer=transformer_fields(
            num_layers=config["num_layers"],
            hidden_size=config["hidden_size"],
            num_attention_heads=config["num_attention_heads"],
            num_query_groups=config.get("num_query_groups"),
            ffn_hidden_size=config.get("ffn_hidden_size"),
            kv_channels=config.get("kv_channels"),
            normalization=_one_of(config, "normalization", ("LayerNorm", "RMSNorm"), where),
            layernorm_epsilon=config["layernorm_epsilon"],
            layernorm_zero_centered_gamma=config.get("layernorm_zero_centered_gamma", False),
            activation_func=activation_func,
            gated_linear_unit=config["gated_linear_unit"],
            add_bias_linear=config["add_bias_linear"],
            add_qkv_bias=config.get("add_qkv_bias", False),
            qk_layernorm=config.get("qk_layernorm", False),
            rotary_interleaved=config.get("rotary_interleaved", False),
            softmax_scale=config.get("softmax_scale"),
        ),
        vocab_rows=rows,
        vocab_size=min(config.get("vocab_size") or vocab_size or rows, rows),
        max_sequence_length=length,
        position_embedding_type=position,
        rotary_percent=float(config.get("rotary_percent") or 1.0),
        rotary_base=float(config.get("rotary_base") or 10000),
        rope_scaling=rope_scaling,
        rope_scaling_factor=rope_scaling_factor,
        seq_len_interpolation_factor=float(interpolation) if interpolation else None,
        share_embeddings_and_output_weights=bool(config["share_embeddings_and_output_weights"]),
    )


def target_of(node: Any) -> str:
    """The dotted name that a node of the configuration stands for."""
    return str(node.get("_target_")) if isinstance(node, Mapping) else str(node)


def whole_number(value: float | None) -> float | int | None:
    """As an int where it is one: the type that Megatron's parsers and providers give such a field."""
    return int(value) if value is not None and float(value).is_integer() else value


def _one_of(config: Mapping[str, Any], name: str, known: tuple[str, ...], where: str) -> str:
    if config[name] not in known:
        raise CheckpointError(
            f"{where} says {name}: {config[name]}, which is not supported: known are {', '.join(known)}."
        )
    return config[name]


def _activation(node: Any, where: str) -> Callable[[Tensor], Tensor]:
    name = target_of(node)
    package, function = name.split(".")[0], name.rsplit(".", 1)[-1]
    bound = {key: node[key] for key in node if not str(key).startswith("_")} if isinstance(node, Mapping) else {}
    if package in ("torch", "nemo", "megatron") and function in ACTIVATIONS:
        if not bound:
            return ACTIVATIONS[function]
        if function == "gelu" and bound == {"approximate": "tanh"}:
            return gelu_tanh
    with_ = f" with {', '.join(f'{key}={value}' for key, value in bound.items())}" if bound else ""
    raise CheckpointError(
        f"{where} says activation_func: {name}{with_}, which is not supported: known are {', '.join(ACTIVATIONS)}."
    )


def _rope_scaling(config: Mapping[str, Any], where: str) -> tuple[bool, float]:
    """Whether Llama 3.1's scaling applies, and its factor.

    NeMo 2's configuration classes of Llama 3.1 have scale_factor and its companions, and always apply them.
    """
    if config.get("scale_factor") is None:
        if not config.get("rope_scaling"):
            return False, Architecture.rope_scaling_factor
        return True, float(config.get("rope_scaling_factor") or Architecture.rope_scaling_factor)
    refuse_other_rope_scaling(config, where)
    return True, float(config["scale_factor"])
