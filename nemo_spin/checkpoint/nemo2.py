"""NeMo 2: `context/model.yaml`, to an Architecture.

The file is a dump of Python objects; it is read as data, and nothing that it names is ever imported. `_target_` names
carry meaning all the same: only the configuration classes of models that megatron-core's GPT computes are accepted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from nemo_spin.checkpoint.architecture import (
    Architecture,
    gelu_tanh,
    quick_gelu,
    squared_relu,
    transformer_fields,
)
from nemo_spin.checkpoint.supported import refuse_other_rope_scaling, refuse_unsupported
from nemo_spin.checkpoint.weight_store import EMBEDDING, POSITIONS, StoredTensor
from nemo_spin.errors import CheckpointError

KEY_PREFIX = "module."

# Modules of nemo.collections.llm.gpt.model whose classes differ from GPTConfig in their fields only, or in the
# Llama 3.1 scaling of rotary embeddings. Others add computation of their own (Gemma scales its embeddings, ...).
_MODULES = frozenset(
    """
    baichuan base chatglm llama llama_nemotron mistral nemotron phi3mini qwen2 qwen3 starcoder starcoder2
    """.split()
)
_NEMO = "nemo.collections.llm.gpt.model."
_LAYER_SPECS = frozenset({"default_layer_spec", "transformer_engine_layer_spec", "local_layer_spec"})

# Last part of the name -> function; the name must be one of torch's, NeMo's or megatron-core's.
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


def architecture_from_nemo2(
    context: Mapping[str, Any], tensors: Mapping[str, StoredTensor], vocab_size: int | None, where: str
) -> Architecture:
    """The architecture of a NeMo 2 model.

    context: model.yaml as plain data. tensors: what is stored (`WeightStore.tensors`).
    vocab_size: number of ids of the tokenizer; used when the configuration gives none, None for all stored rows.
    where: names the configuration in messages. Raises CheckpointError for what cannot be represented.
    """
    config = context.get("config")
    if not isinstance(config, Mapping):
        raise CheckpointError(f"{where} has no config: it is not the description of a model.")
    _refuse(context, config, where)
    if config.get("transformer_layer_spec"):
        spec = _target(config["transformer_layer_spec"])
        if spec.rsplit(".", 1)[-1] not in _LAYER_SPECS:
            raise CheckpointError(f"{where} says transformer_layer_spec: {spec}, layers that are not supported.")
    activation_func = _activation(config["activation_func"], where)
    if activation_func is F.gelu and (config.get("bias_activation_fusion") or config.get("use_te_activation_func")):
        # megatron-core's fused bias and GELU, like TransformerEngine's GELU, computes the tanh approximation.
        activation_func = gelu_tanh
    position = config["position_embedding_type"]
    if position not in ("rope", "learned_absolute", "none"):
        raise CheckpointError(
            f"{where} says position_embedding_type: {position}, which is not supported: known are rope, "
            "learned_absolute, none."
        )
    if config["normalization"] not in ("LayerNorm", "RMSNorm"):
        raise CheckpointError(
            f"{where} says normalization: {config['normalization']}, which is not supported: known are LayerNorm, "
            "RMSNorm."
        )
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
            normalization=config["normalization"],
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
        rotary_percent=float(config.get("rotary_percent", 1.0)),
        rotary_base=float(config.get("rotary_base", 10000)),
        rope_scaling=rope_scaling,
        rope_scaling_factor=rope_scaling_factor,
        seq_len_interpolation_factor=float(interpolation) if interpolation else None,
        share_embeddings_and_output_weights=bool(config["share_embeddings_and_output_weights"]),
    )


def _refuse(context: Mapping[str, Any], config: Mapping[str, Any], where: str) -> None:
    for node, what in ((context, "model"), (config, "configuration")):
        target = str(node.get("_target_"))
        module = target.removeprefix(_NEMO).split(".")[0] if target.startswith(_NEMO) else None
        if module not in _MODULES:
            raise CheckpointError(
                f"{where} is of the {what} class {target}, which is not supported: supported are NeMo's GPT classes of "
                f"{', '.join(sorted(_MODULES))}."
            )
    if context.get("model_transform"):
        raise CheckpointError(
            f"{where} says model_transform: {_target(context['model_transform'])}, a model with adapters: merge them "
            "into their base model first (NeMo 2's llm.peft.merge_lora)."
        )
    for name in _REQUIRED:
        if config.get(name) is None:
            raise CheckpointError(f"{where} has no config.{name}: it is not the whole configuration of a GPT.")
    refuse_unsupported(config, _USED, where)


def _target(node: Any) -> str:
    return str(node.get("_target_")) if isinstance(node, Mapping) else str(node)


def _activation(node: Any, where: str) -> Callable[[Tensor], Tensor]:
    name = _target(node)
    package, function = name.split(".")[0], name.rsplit(".", 1)[-1]
    if package not in ("torch", "nemo", "megatron") or function not in ACTIVATIONS:
        raise CheckpointError(
            f"{where} says activation_func: {name}, which is not supported: known are {', '.join(ACTIVATIONS)}."
        )
    return ACTIVATIONS[function]


def _rope_scaling(config: Mapping[str, Any], where: str) -> tuple[bool, float]:
    """Llama 3.1's configuration classes have scale_factor and its companions as fields, and always apply them."""
    if config.get("scale_factor") is None:
        return bool(config.get("rope_scaling", False)), float(config.get("rope_scaling_factor") or 8.0)
    refuse_other_rope_scaling(config, where)
    return True, float(config["scale_factor"])
