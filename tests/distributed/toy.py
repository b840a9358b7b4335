"""Small models with the same weights in every parallel layout, and in transformers."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from nemo_spin.megatron.architecture import Architecture, transformer_fields


def toy_architecture(**overrides: Any) -> Architecture:
    """A Llama of 4 layers, 4 heads, 2 query groups and 251 tokens; overrides are fields of the architecture or of its
    transformer."""
    transformer = {
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 64,
        "kv_channels": None,
        "normalization": "RMSNorm",
        "layernorm_epsilon": 1e-5,
        "layernorm_zero_centered_gamma": False,
        "activation_func": F.silu,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "qk_layernorm": False,
        "rotary_interleaved": False,
        "softmax_scale": None,
    }
    outer: dict[str, Any] = {
        "vocab_rows": 251,
        "vocab_size": 251,
        "max_sequence_length": 96,
        "position_embedding_type": "rope",
    }
    for name, value in overrides.items():
        (transformer if name in transformer else outer)[name] = value
    return Architecture(transformer=transformer_fields(**transformer), **outer)


def gpt2_architecture(**overrides: Any) -> Architecture:
    """The toy with learned positions, LayerNorm, biases and tied embeddings."""
    gpt2 = {
        "num_query_groups": 4,
        "normalization": "LayerNorm",
        "activation_func": F.gelu,
        "gated_linear_unit": False,
        "add_bias_linear": True,
        "add_qkv_bias": True,
        "position_embedding_type": "learned_absolute",
        "share_embeddings_and_output_weights": True,
    }
    return toy_architecture(**{**gpt2, **overrides})


def sharded_tensors(state: Any) -> Iterator[ShardedTensor]:
    if isinstance(state, ShardedTensor):
        yield state
    elif isinstance(state, ShardedTensorFactory):
        yield from sharded_tensors(state.build())
    elif isinstance(state, dict):
        yield from sharded_tensors(list(state.values()))
    elif isinstance(state, (list, tuple)):
        for value in state:
            yield from sharded_tensors(value)


def _drawn(key: str, shape: tuple[int, ...], scale: float) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    if "norm" in key and key.endswith("weight"):
        return 1 + 0.1 * torch.randn(shape, generator=generator)
    # More rows than any layout pads the vocabulary to: the real ones are then the same in all of them.
    rows = -(-shape[0] // 64) * 64 if "word_embeddings" in key or "output_layer" in key else shape[0]
    return scale * torch.randn(rows, *shape[1:], generator=generator)[: shape[0]]


@torch.no_grad()
def fill_deterministically(model: GPTModel, scale: float = 0.2) -> GPTModel:
    """Weights that depend on nothing but their name: the same model in every layout."""
    for tensor in sharded_tensors(model.sharded_state_dict()):
        if tensor.data is None or not tensor.data.is_floating_point():
            continue
        full = _drawn(tensor.key, tuple(tensor.global_shape), scale)
        shape = (1,) * tensor.prepend_axis_num + tuple(tensor.local_shape)
        part = tuple(slice(begin, begin + size) for begin, size in zip(tensor.global_offset, shape, strict=True))
        tensor.data.copy_(full[part].reshape(tensor.data.shape))
    return model


def to_transformers(architecture: Architecture, model: GPTModel) -> PreTrainedModel:
    """The same model, in evaluation mode, of transformers. The given one must be whole: one process, the local spec."""
    state = {name: value.detach() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    make = _llama if architecture.position_embedding_type == "rope" else _gpt2
    return make(architecture, state).eval()


def _split_qkv(transformer: dict[str, Any], qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """megatron-core keeps each query group's heads together: [groups, heads per group + 2, d, ...]."""
    groups, head_dim = transformer["num_query_groups"], transformer["kv_channels"]
    per_group = transformer["num_attention_heads"] // groups
    parts = qkv.view(groups, per_group + 2, head_dim, -1).split([per_group, 1, 1], dim=1)
    query, key, value = (part.reshape(-1, *qkv.shape[1:]) for part in parts)
    return query, key, value


def _llama(architecture: Architecture, state: dict[str, Tensor]) -> PreTrainedModel:
    transformer = architecture.transformer
    rows = len(state["embedding.word_embeddings.weight"])
    tied = architecture.share_embeddings_and_output_weights
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=rows,
            hidden_size=transformer["hidden_size"],
            intermediate_size=transformer["ffn_hidden_size"],
            num_hidden_layers=transformer["num_layers"],
            num_attention_heads=transformer["num_attention_heads"],
            num_key_value_heads=transformer["num_query_groups"],
            head_dim=transformer["kv_channels"],
            max_position_embeddings=architecture.max_sequence_length,
            rms_norm_eps=transformer["layernorm_epsilon"],
            rope_theta=architecture.rotary_base,
            tie_word_embeddings=tied,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
    )
    weights = {
        "model.embed_tokens.weight": state["embedding.word_embeddings.weight"],
        "model.norm.weight": state["decoder.final_layernorm.weight"],
        "lm_head.weight": state["embedding.word_embeddings.weight" if tied else "output_layer.weight"],
    }
    for i in range(transformer["num_layers"]):
        ours, theirs = f"decoder.layers.{i}", f"model.layers.{i}"
        query, key, value = _split_qkv(transformer, state[f"{ours}.self_attention.linear_qkv.weight"])
        gate, up = state[f"{ours}.mlp.linear_fc1.weight"].chunk(2)
        weights |= {
            f"{theirs}.input_layernorm.weight": state[f"{ours}.input_layernorm.weight"],
            f"{theirs}.self_attn.q_proj.weight": query,
            f"{theirs}.self_attn.k_proj.weight": key,
            f"{theirs}.self_attn.v_proj.weight": value,
            f"{theirs}.self_attn.o_proj.weight": state[f"{ours}.self_attention.linear_proj.weight"],
            f"{theirs}.post_attention_layernorm.weight": state[f"{ours}.pre_mlp_layernorm.weight"],
            f"{theirs}.mlp.gate_proj.weight": gate,
            f"{theirs}.mlp.up_proj.weight": up,
            f"{theirs}.mlp.down_proj.weight": state[f"{ours}.mlp.linear_fc2.weight"],
        }
    llama.load_state_dict(weights, strict=True)
    return llama


def _gpt2(architecture: Architecture, state: dict[str, Tensor]) -> PreTrainedModel:
    transformer = architecture.transformer
    gpt2 = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(state["embedding.word_embeddings.weight"]),
            n_positions=architecture.max_sequence_length,
            n_embd=transformer["hidden_size"],
            n_layer=transformer["num_layers"],
            n_head=transformer["num_attention_heads"],
            n_inner=transformer["ffn_hidden_size"],
            activation_function="gelu",
            layer_norm_epsilon=transformer["layernorm_epsilon"],
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
    )
    weights = {
        "transformer.wte.weight": state["embedding.word_embeddings.weight"],
        "lm_head.weight": state["embedding.word_embeddings.weight"],
        "transformer.wpe.weight": state["embedding.position_embeddings.weight"],
        "transformer.ln_f.weight": state["decoder.final_layernorm.weight"],
        "transformer.ln_f.bias": state["decoder.final_layernorm.bias"],
    }
    for i in range(transformer["num_layers"]):
        ours, theirs = f"decoder.layers.{i}", f"transformer.h.{i}"
        attention, mlp = f"{ours}.self_attention", f"{ours}.mlp"
        for name, norm in (("ln_1", "input_layernorm"), ("ln_2", "pre_mlp_layernorm")):
            weights[f"{theirs}.{name}.weight"] = state[f"{ours}.{norm}.weight"]
            weights[f"{theirs}.{name}.bias"] = state[f"{ours}.{norm}.bias"]
        for kind in ("weight", "bias"):
            qkv = torch.cat(_split_qkv(transformer, state[f"{attention}.linear_qkv.{kind}"]))
            linears = {
                "attn.c_attn": qkv,
                "attn.c_proj": state[f"{attention}.linear_proj.{kind}"],
                "mlp.c_fc": state[f"{mlp}.linear_fc1.{kind}"],
                "mlp.c_proj": state[f"{mlp}.linear_fc2.{kind}"],
            }
            # GPT-2's Conv1D stores the transpose of a Linear's weight.
            weights |= {
                f"{theirs}.{name}.{kind}": value.T if kind == "weight" else value for name, value in linears.items()
            }
    gpt2.load_state_dict(weights, strict=True)
    return gpt2
