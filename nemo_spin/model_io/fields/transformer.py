"""The fields that configurations describe a GPT with, to an Architecture and back.

They are those of megatron-core's TransformerConfig and GPTModel. NeMo 2 and Megatron-Bridge write them as they are; the
readers and writers of the other families translate names. Callables stand there as `{_target_: dotted.name}`, which is
read as data: nothing that a configuration names is ever imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from nemo_spin.errors import CheckpointError
from nemo_spin.megatron.architecture import Architecture, gelu_tanh, quick_gelu, squared_relu, transformer_fields
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
# The names that are written for them.
ACTIVATION_NAMES = {
    F.silu: "torch.nn.functional.silu",
    F.gelu: "torch.nn.functional.gelu",
    F.relu: "torch.nn.functional.relu",
    squared_relu: "megatron.core.activations.squared_relu",
    quick_gelu: "megatron.core.activations.quick_gelu",
    gelu_tanh: "megatron.core.activations.fast_gelu",
}
_LAYER_SPECS = frozenset({"default_layer_spec", "transformer_engine_layer_spec", "local_layer_spec"})

# Fields of `Architecture.transformer` that a configuration may leave open -> what they are then.
_OPEN = {
    "num_query_groups": None,
    "ffn_hidden_size": None,
    "kv_channels": None,
    "layernorm_zero_centered_gamma": False,
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "rotary_interleaved": False,
    "softmax_scale": None,
}
_OF_TRANSFORMER = """
    num_layers hidden_size num_attention_heads normalization layernorm_epsilon activation_func gated_linear_unit
    add_bias_linear
    """.split()
_REQUIRED = [*_OF_TRANSFORMER, "position_embedding_type", "share_embeddings_and_output_weights", "seq_length"]
_USED = frozenset(
    [
        *_REQUIRED,
        *_OPEN,
        *"""
        _target_ rotary_percent rotary_base seq_len_interpolation_factor vocab_size transformer_layer_spec rope_scaling
        rope_scaling_factor scale_factor low_freq_factor high_freq_factor old_context_len
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

    config: field -> value; an activation may be the function itself. tensors: what is stored, layers one by one.
    vocab_size: number of ids of the tokenizer; used when the configuration gives none, None for all stored rows.
    where: names the configuration in messages; section: before the name of a field there ("config."). Raises
    CheckpointError for what cannot be represented.
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
    one_of(config, "normalization", ("LayerNorm", "RMSNorm"), where)
    position = one_of(config, "position_embedding_type", ("rope", "learned_absolute", "none"), where)
    length = config["seq_length"]
    if position == "learned_absolute" and POSITIONS in tensors:
        length = tensors[POSITIONS].shape[0]
    rope_scaling, rope_scaling_factor = _rope_scaling(config, where)
    interpolation = config.get("seq_len_interpolation_factor")
    rows = tensors[EMBEDDING].shape[0]
    given = {name: config[name] for name in _OF_TRANSFORMER}
    given |= {name: config.get(name, default) for name, default in _OPEN.items()}
    return Architecture(
        transformer=transformer_fields(**given | {"activation_func": activation_func}),
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


def fields_of(architecture: Architecture) -> dict[str, Any]:
    """The fields that describe the architecture, but for how the vocabulary is padded: field -> value.

    The activation is the function itself, and whole numbers of rotary embeddings are of the type int, which Megatron's
    parsers and providers give such a field.
    """
    return {
        **architecture.transformer,
        "position_embedding_type": architecture.position_embedding_type,
        "rotary_percent": architecture.rotary_percent,
        "rotary_base": _whole_number(architecture.rotary_base),
        "rope_scaling": architecture.rope_scaling,
        "rope_scaling_factor": architecture.rope_scaling_factor,
        "seq_len_interpolation_factor": _whole_number(architecture.seq_len_interpolation_factor),
        "seq_length": architecture.max_sequence_length,
        "share_embeddings_and_output_weights": architecture.share_embeddings_and_output_weights,
        "vocab_size": architecture.vocab_size,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }


def target_of(node: Any) -> str:
    """The dotted name that a node of the configuration stands for."""
    return str(node.get("_target_")) if isinstance(node, Mapping) else str(node)


def target(name: str) -> dict[str, Any]:
    """The node that stands for a class or function itself."""
    return {"_target_": name, "_call_": False}


def _whole_number(value: float | None) -> float | int | None:
    return int(value) if value is not None and float(value).is_integer() else value


def one_of(config: Mapping[str, Any], name: str, known: Iterable[str], where: str) -> str:
    """The field's value. Raises CheckpointError if it is none of those that are known."""
    if config[name] not in known:
        raise CheckpointError(
            f"{where} says {name}: {config[name]}, which is not supported: known are {', '.join(known)}."
        )
    return config[name]


def _activation(node: Any, where: str) -> Callable[[Tensor], Tensor]:
    if node in ACTIVATIONS.values():
        return node
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
