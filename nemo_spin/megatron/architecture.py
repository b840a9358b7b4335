"""The architecture of a GPT, independent of the family of its checkpoint and of the parallel layout.

Readers of checkpoints make one of a configuration; `gpt.py` builds the model of it. What a megatron-core GPT of today
cannot compute as the original did is refused before it gets here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_spin.errors import CheckpointError, ConfigError


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh approximation; same shape and dtype as x."""
    return F.gelu(x, approximate="tanh")


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x); same shape and dtype as x."""
    return x * torch.sigmoid(1.702 * x)


def squared_relu(x: Tensor) -> Tensor:
    """relu(x) squared; same shape and dtype as x."""
    return F.relu(x).square()


@dataclass(frozen=True)
class Architecture:
    """Everything needed to build the GPT.

    transformer: field -> value of megatron-core's TransformerConfig (num_layers, hidden_size, activation_func, ...).
    vocab_rows: rows of the embedding as stored.
    vocab_size: real rows: those beyond are padding, never sampled, not in the softmax.
    max_sequence_length: in tokens.
    position_embedding_type: "rope", "learned_absolute" or "none".
    rotary_percent: fraction of each head's channels that is rotated, 0 to 1.
    rope_scaling, rope_scaling_factor: Llama 3.1's scaling, with low 1, high 4 and an original length of 8192 tokens.
    seq_len_interpolation_factor: linear scaling of positions, None for none.
    """

    transformer: dict[str, Any]
    vocab_rows: int
    vocab_size: int
    max_sequence_length: int
    position_embedding_type: str
    rotary_percent: float = 1.0
    rotary_base: float = 10000
    rope_scaling: bool = False
    rope_scaling_factor: float = 8.0
    seq_len_interpolation_factor: float | None = None
    share_embeddings_and_output_weights: bool = False


def transformer_fields(
    *,
    num_layers: int,
    hidden_size: int,
    num_attention_heads: int,
    num_query_groups: int | None,
    ffn_hidden_size: int | None,
    kv_channels: int | None,
    normalization: str,
    layernorm_epsilon: float,
    layernorm_zero_centered_gamma: bool,
    activation_func: Callable[[Tensor], Tensor],
    gated_linear_unit: bool,
    add_bias_linear: bool,
    add_qkv_bias: bool,
    qk_layernorm: bool,
    rotary_interleaved: bool,
    softmax_scale: float | None,
) -> dict[str, Any]:
    """`Architecture.transformer` with the numbers that configurations leave open filled in as megatron-core does.

    Raises CheckpointError if the numbers contradict each other.
    """
    for name, value in (
        ("num_layers", num_layers),
        ("hidden_size", hidden_size),
        ("num_attention_heads", num_attention_heads),
        ("num_query_groups", num_query_groups or num_attention_heads),
        ("ffn_hidden_size", ffn_hidden_size or 4 * hidden_size),
        ("kv_channels", kv_channels or 1),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(
                f"The checkpoint's configuration gives {name}: {value}, which is no positive integer."
            )
    groups = num_query_groups or num_attention_heads
    if num_attention_heads % groups:
        raise CheckpointError(
            f"The checkpoint's configuration contradicts itself: num_attention_heads {num_attention_heads} is no "
            f"multiple of num_query_groups {groups}."
        )
    if not kv_channels and hidden_size % num_attention_heads:
        raise CheckpointError(
            f"The checkpoint's configuration contradicts itself: hidden_size {hidden_size} is no multiple of "
            f"num_attention_heads {num_attention_heads}, and kv_channels is not given."
        )
    return {
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "num_attention_heads": num_attention_heads,
        "num_query_groups": groups,
        "ffn_hidden_size": ffn_hidden_size or 4 * hidden_size,
        "kv_channels": kv_channels or hidden_size // num_attention_heads,
        "normalization": normalization,
        "layernorm_epsilon": float(layernorm_epsilon),
        "layernorm_zero_centered_gamma": bool(layernorm_zero_centered_gamma),
        "activation_func": activation_func,
        "gated_linear_unit": bool(gated_linear_unit),
        "add_bias_linear": bool(add_bias_linear),
        "add_qkv_bias": bool(add_qkv_bias),
        "qk_layernorm": bool(qk_layernorm),
        "rotary_interleaved": bool(rotary_interleaved),
        "softmax_scale": None if softmax_scale is None else float(softmax_scale),
    }


def layer_tensors(transformer: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of each parameter of one layer, under the names that megatron-core's checkpoints use."""
    hidden, ffn = transformer["hidden_size"], transformer["ffn_hidden_size"]
    head_dim = transformer["kv_channels"]
    query = transformer["num_attention_heads"] * head_dim
    qkv = query + 2 * transformer["num_query_groups"] * head_dim
    fc1 = 2 * ffn if transformer["gated_linear_unit"] else ffn
    shapes = {
        "self_attention.linear_qkv.layer_norm_weight": (hidden,),
        "self_attention.linear_qkv.weight": (qkv, hidden),
        "self_attention.linear_proj.weight": (hidden, query),
        "mlp.linear_fc1.layer_norm_weight": (hidden,),
        "mlp.linear_fc1.weight": (fc1, hidden),
        "mlp.linear_fc2.weight": (hidden, ffn),
    }
    if transformer["normalization"] == "LayerNorm":
        shapes["self_attention.linear_qkv.layer_norm_bias"] = (hidden,)
        shapes["mlp.linear_fc1.layer_norm_bias"] = (hidden,)
    if transformer["qk_layernorm"]:
        for name in ("q_layernorm", "k_layernorm"):
            shapes[f"self_attention.{name}.weight"] = (head_dim,)
            if transformer["normalization"] == "LayerNorm":
                shapes[f"self_attention.{name}.bias"] = (head_dim,)
    if transformer["add_bias_linear"]:
        shapes["self_attention.linear_proj.bias"] = (hidden,)
        shapes["mlp.linear_fc1.bias"] = (fc1,)
        shapes["mlp.linear_fc2.bias"] = (hidden,)
    if transformer["add_bias_linear"] or transformer["add_qkv_bias"]:
        shapes["self_attention.linear_qkv.bias"] = (qkv,)
    return shapes


def outer_tensors(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Name and shape of each parameter outside the layers, with the embedding's rows as stored."""
    hidden = architecture.transformer["hidden_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "embedding.word_embeddings.weight": (architecture.vocab_rows, hidden),
        "decoder.final_layernorm.weight": (hidden,),
    }
    if architecture.transformer["normalization"] == "LayerNorm":
        shapes["decoder.final_layernorm.bias"] = (hidden,)
    if architecture.position_embedding_type == "learned_absolute":
        shapes["embedding.position_embeddings.weight"] = (architecture.max_sequence_length, hidden)
    if not architecture.share_embeddings_and_output_weights:
        shapes["output_layer.weight"] = (architecture.vocab_rows, hidden)
    return shapes


def parameter_count(architecture: Architecture) -> int:
    """Number of parameters as stored: tied embeddings count once."""
    per_layer = sum(math.prod(shape) for shape in layer_tensors(architecture.transformer).values())
    outside = sum(math.prod(shape) for shape in outer_tensors(architecture).values())
    return architecture.transformer["num_layers"] * per_layer + outside


def check_layout(
    architecture: Architecture,
    tensor_model_parallel_size: int,
    pipeline_model_parallel_size: int,
    sequence_parallel: bool = False,
) -> None:
    """Raises ConfigError, in one sentence, if the model cannot be laid out so."""
    transformer, tp, pp = architecture.transformer, tensor_model_parallel_size, pipeline_model_parallel_size
    for field, what in (
        ("num_attention_heads", "attention heads"),
        ("num_query_groups", "query groups"),
        ("ffn_hidden_size", "channels of the feed-forward layer"),
    ):
        if transformer[field] % tp:
            raise ConfigError(
                f"model.tensor_model_parallel_size {tp} does not divide the checkpoint's {transformer[field]} {what}: "
                "choose a size that does."
            )
    if transformer["num_layers"] % pp:
        raise ConfigError(
            f"model.pipeline_model_parallel_size {pp} does not divide the checkpoint's {transformer['num_layers']} "
            "layers: choose a size that does."
        )
    if sequence_parallel and tp == 1:
        raise ConfigError(
            "model.sequence_parallel needs a model.tensor_model_parallel_size above 1: it splits the sequence over the "
            "tensor-parallel ranks."
        )
