"""Megatron-LM: the `args` of a checkpoint, which are those of its command line, to an Architecture and back.

After `core_transformer_config_from_args` and the GPT builder of Megatron-LM, in its releases since 2023. `args` hold
what its argument parser made of the command line after checking it: defaults are filled in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from nemo_spin.errors import CheckpointError
from nemo_spin.megatron.architecture import Architecture, gelu_tanh, quick_gelu, squared_relu
from nemo_spin.model_io.fields.supported import UNSUPPORTED, is_transformer_field
from nemo_spin.model_io.fields.transformer import architecture_from_fields, fields_of
from nemo_spin.model_io.stores.common_state import member_of
from nemo_spin.model_io.stores.interface import StoredTensor

# Before the names of weights in a checkpoint of Megatron-LM or Megatron-Bridge: nothing.
MEGATRON_PREFIX = ""

# Arguments that are no fields of TransformerConfig -> what they ask for.
_REFUSED = {
    "heterogeneous_layers_config_encoded_json": "layers that differ from each other",
    "heterogeneous_layers_config_path": "layers that differ from each other",
    "hybrid_attention_ratio": "layers other than attention",
    "hybrid_layer_pattern": "layers other than attention",
    "hybrid_mlp_ratio": "layers other than attention",
    "hybrid_override_pattern": "layers other than attention",
    "num_experts": "a mixture of experts",
    "retro_add_retriever": "a model that retrieves",
    "use_legacy_models": "a model from before megatron-core",
}
# Modules and functions of --spec that build the layers of a plain GPT.
_SPEC_MODULE = "gpt_layer_specs"
# megatron.core.enums.ModelType.encoder_or_decoder, by its name or its value; the other one is T5's.
_DECODER_ONLY = ("encoder_or_decoder", 1)

_SAME_NAME = """
    num_layers hidden_size num_attention_heads ffn_hidden_size kv_channels normalization add_bias_linear add_qkv_bias
    qk_layernorm rotary_interleaved softmax_scale
    """.split()
_ROTARY = ("rotary_percent", "rotary_base")
_ALSO_WRITTEN = """
    num_query_groups layernorm_epsilon layernorm_zero_centered_gamma position_embedding_type rope_scaling_factor
    seq_length vocab_size attention_dropout hidden_dropout
    """.split()


def architecture_from_args(
    args: Mapping[str, Any], tensors: Mapping[str, StoredTensor], vocab_size: int | None, where: str
) -> Architecture:
    """The architecture of a Megatron-LM model.

    args: the namespace as a mapping (`read_common_state`). See `architecture_from_fields` for the other
    arguments and errors.
    """
    _refuse(args, where)
    fields = {name: value for name, value in args.items() if is_transformer_field(name) or name in UNSUPPORTED}
    fields |= {name: args[name] for name in (*_SAME_NAME, *_ROTARY) if name in args}
    if "disable_bias_linear" in args:
        fields["add_bias_linear"] = not args["disable_bias_linear"]
    biases = fields.setdefault("add_bias_linear", True)
    activation, gated = _activation(args)
    fields |= {
        "activation_func": activation,
        "gated_linear_unit": gated,
        # Without biases there is nothing to fuse, and Megatron-LM computes the exact GELU.
        "bias_activation_fusion": biases and _first(args, ("bias_gelu_fusion",), True),
        "num_query_groups": args.get("num_query_groups") if args.get("group_query_attention") else None,
        "normalization": _first(args, ("normalization",), "LayerNorm"),
        "layernorm_epsilon": _first(args, ("layernorm_epsilon", "norm_epsilon"), 1e-5),
        "layernorm_zero_centered_gamma": _first(args, ("layernorm_zero_centered_gamma", "apply_layernorm_1p"), False),
        "position_embedding_type": _position(args),
        "seq_length": _first(args, ("max_position_embeddings", "seq_length"), None),
        "rope_scaling": args.get("use_rope_scaling"),
        "rope_scaling_factor": args.get("rope_scaling_factor"),
        "seq_len_interpolation_factor": args.get("rotary_seq_len_interpolation_factor"),
        "share_embeddings_and_output_weights": not args.get("untie_embeddings_and_output_weights"),
        # A tokenizer that is a mere number does not count its end-of-document token.
        "vocab_size": None if str(args.get("tokenizer_type")).startswith("Null") else args.get("vocab_size"),
    }
    return architecture_from_fields(fields, tensors, vocab_size, where)


def _refuse(args: Mapping[str, Any], where: str) -> None:
    for name, what in _REFUSED.items():
        if args.get(name):
            raise CheckpointError(f"{where} says {name}: {args[name]}, and {what} is not supported.")
    model_type = args.get("model_type")
    if model_type is not None and member_of(model_type) not in (None, *_DECODER_ONLY):
        raise CheckpointError(
            f"{where} says model_type: {model_type}, which is no GPT: only GPT models can be trained."
        )
    spec = args.get("spec")
    modules = spec if isinstance(spec, (list, tuple)) else [spec]
    if spec and not any(str(module).endswith(_SPEC_MODULE) for module in modules):
        raise CheckpointError(
            f"{where} says spec: {' '.join(map(str, modules))}, layers of their own, which are not supported."
        )


def _activation(args: Mapping[str, Any]) -> tuple[str, bool]:
    """Name of the activation, and whether it gates, in the order in which Megatron-LM decides."""
    if args.get("squared_relu"):
        return "megatron.core.activations.squared_relu", False
    if args.get("swiglu"):
        return "torch.nn.functional.silu", True
    if args.get("quick_geglu"):
        return "megatron.core.activations.quick_gelu", True
    if args.get("openai_gelu"):
        return "megatron.core.activations.fast_gelu", False
    return "torch.nn.functional.gelu", False


def _position(args: Mapping[str, Any]) -> str:
    if args.get("use_rotary_position_embeddings"):
        return "rope"
    return _first(args, ("position_embedding_type",), "learned_absolute")


def _first(args: Mapping[str, Any], names: tuple[str, ...], default: Any) -> Any:
    return next((args[name] for name in names if args.get(name) is not None), default)


def to_args(architecture: Architecture, dtype: torch.dtype) -> dict[str, Any]:
    """The architecture in Megatron-LM's names: what its --use-checkpoint-args takes over, and what else it looks at.

    dtype: of the stored weights. `architecture_from_args` reads the same architecture back, unless `launch_flags` says
    that Megatron-LM has no argument for a part of it.
    """
    fields = fields_of(architecture)
    activation, gated = fields["activation_func"], fields["gated_linear_unit"]
    same = (*_SAME_NAME, *_ROTARY, *_ALSO_WRITTEN)
    return {
        **{name: fields[name] for name in same},
        "norm_epsilon": fields["layernorm_epsilon"],
        "apply_layernorm_1p": fields["layernorm_zero_centered_gamma"],
        "group_query_attention": fields["num_query_groups"] != fields["num_attention_heads"],
        "swiglu": activation is F.silu and gated,
        "squared_relu": activation is squared_relu and not gated,
        "quick_geglu": activation is quick_gelu and gated,
        "openai_gelu": activation is gelu_tanh and not gated,
        "bias_gelu_fusion": activation is gelu_tanh and not gated and fields["add_bias_linear"],
        "bias_swiglu_fusion": False,
        "add_position_embedding": True,
        "use_rotary_position_embeddings": fields["position_embedding_type"] == "rope",
        "use_rope_scaling": fields["rope_scaling"],
        "rotary_seq_len_interpolation_factor": fields["seq_len_interpolation_factor"],
        "max_position_embeddings": fields["seq_length"],
        "padded_vocab_size": architecture.vocab_rows,
        "make_vocab_size_divisible_by": 1,
        "untie_embeddings_and_output_weights": not fields["share_embeddings_and_output_weights"],
        "apply_query_key_layer_scaling": False,
        "num_experts": None,
        "multi_latent_attention": False,
        "spec": None,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "params_dtype": dtype,
        "ckpt_format": "torch_dist",
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "no_save_optim": True,
        "no_save_rng": True,
    }


def launch_flags(architecture: Architecture) -> tuple[list[str], list[str]]:
    """What Megatron-LM has to be told on its command line beside --use-checkpoint-args, which takes over most only.

    Returns arguments, and sentences on what Megatron-LM has no argument for: empty if it computes the same model.
    """
    transformer = architecture.transformer
    activation, gated = transformer["activation_func"], transformer["gated_linear_unit"]
    flags = ["--norm-epsilon", str(transformer["layernorm_epsilon"])]
    missing = []
    if transformer["qk_layernorm"]:
        flags.append("--qk-layernorm")
    if activation is quick_gelu and gated:
        flags.append("--quick-geglu")
    elif activation is F.gelu and not gated:
        flags.append("--no-bias-gelu-fusion")
    elif activation is gelu_tanh and not gated and transformer["add_bias_linear"]:
        # Its fused bias and GELU, the default, is the tanh approximation.
        pass
    elif (activation, gated) not in ((F.silu, True), (squared_relu, False)):
        name = getattr(activation, "__name__", str(activation))
        missing.append(f"Megatron-LM has no argument for the activation {name}{', gated' if gated else ''}.")
    if architecture.rope_scaling:
        flags.append("--use-rope-scaling")
        if architecture.rope_scaling_factor != Architecture.rope_scaling_factor:
            flags += ["--rope-scaling-factor", str(architecture.rope_scaling_factor)]
            missing.append(
                "Megatron-LM's pretrain_gpt.py scales rotary embeddings by a factor of 8, whatever its "
                f"--rope-scaling-factor says, but the model was made with {architecture.rope_scaling_factor:g}."
            )
    if architecture.seq_len_interpolation_factor:
        flags += ["--rotary-seq-len-interpolation-factor", f"{architecture.seq_len_interpolation_factor:g}"]
    if transformer["softmax_scale"] is not None:
        flags += ["--softmax-scale", str(transformer["softmax_scale"])]
    return flags, missing
