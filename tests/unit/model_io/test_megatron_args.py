from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from nemo_spin.errors import CheckpointError
from nemo_spin.megatron.architecture import Architecture, gelu_tanh, quick_gelu, squared_relu
from nemo_spin.model_io.megatron_lm.args import architecture_from_args, launch_flags, to_args
from nemo_spin.model_io.stores.common_state import StandIn
from nemo_spin.model_io.stores.interface import EMBEDDING, POSITIONS, StoredTensor

TENSORS = {EMBEDDING: StoredTensor((384, 64), torch.bfloat16), POSITIONS: StoredTensor((128, 64), torch.bfloat16)}
# What Megatron-LM's parser leaves of a bare command line: its defaults.
DEFAULTS = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "ffn_hidden_size": 256,
    "kv_channels": 16,
    "group_query_attention": False,
    "num_query_groups": 1,
    "normalization": "LayerNorm",
    "norm_epsilon": 1e-5,
    "apply_layernorm_1p": False,
    "swiglu": False,
    "squared_relu": False,
    "quick_geglu": False,
    "openai_gelu": False,
    "bias_gelu_fusion": True,
    "bias_swiglu_fusion": True,
    "add_bias_linear": True,
    "add_qkv_bias": True,
    "qk_layernorm": False,
    "position_embedding_type": "learned_absolute",
    "use_rotary_position_embeddings": False,
    "rotary_percent": 1.0,
    "rotary_base": 10000,
    "rotary_interleaved": False,
    "use_rope_scaling": False,
    "rope_scaling_factor": 8.0,
    "rotary_seq_len_interpolation_factor": None,
    "seq_length": 64,
    "max_position_embeddings": 128,
    "untie_embeddings_and_output_weights": False,
    "padded_vocab_size": 384,
    "vocab_size": None,
    "tokenizer_type": "HuggingFaceTokenizer",
    "num_experts": None,
    "multi_latent_attention": False,
    "hybrid_attention_ratio": 0.0,
    "hybrid_override_pattern": None,
    "spec": None,
    "model_type": None,
    "cp_comm_type": ["p2p"],
    "transformer_impl": "transformer_engine",
    "fp8": None,
    "attention_dropout": 0.1,
    "apply_query_key_layer_scaling": False,
    "tensor_model_parallel_size": 8,
    "moe_router_topk": 2,
    "encoder_num_layers": 2,
}
LLAMA = {
    "swiglu": True,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "bias_gelu_fusion": False,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "untie_embeddings_and_output_weights": True,
    "group_query_attention": True,
    "num_query_groups": 2,
}


def read(tokenizer_size: int | None = None, **args: Any) -> Architecture:
    return architecture_from_args(DEFAULTS | args, TENSORS, tokenizer_size, "args")


def test_a_gpt_of_2021() -> None:
    found = read()
    assert found.transformer["activation_func"] is gelu_tanh
    assert not found.transformer["gated_linear_unit"]
    assert found.transformer["add_bias_linear"]
    assert found.transformer["num_query_groups"] == 4
    assert found.transformer["normalization"] == "LayerNorm"
    assert found.position_embedding_type == "learned_absolute"
    assert (found.vocab_rows, found.vocab_size, found.max_sequence_length) == (384, 384, 128)
    assert found.share_embeddings_and_output_weights


def test_a_llama() -> None:
    found = read(370, **LLAMA, norm_epsilon=1e-6, rotary_base=500000, use_rope_scaling=True, rope_scaling_factor=32.0)
    assert found.transformer["activation_func"] is F.silu
    assert found.transformer["gated_linear_unit"]
    assert found.transformer["layernorm_epsilon"] == 1e-6
    assert found.transformer["num_query_groups"] == 2
    assert not found.transformer["add_bias_linear"] and not found.transformer["add_qkv_bias"]
    assert (found.position_embedding_type, found.rotary_base) == ("rope", 500000)
    assert (found.rope_scaling, found.rope_scaling_factor) == (True, 32.0)
    assert found.vocab_size == 370
    assert not found.share_embeddings_and_output_weights


@pytest.mark.parametrize(
    ("args", "func", "gated"),
    [
        ({}, gelu_tanh, False),
        ({"bias_gelu_fusion": False}, F.gelu, False),
        # Nothing to fuse with: the parser clears the fusion, but a hand-made namespace may not.
        ({"add_bias_linear": False}, F.gelu, False),
        ({"bias_gelu_fusion": False, "openai_gelu": True}, gelu_tanh, False),
        ({"squared_relu": True}, squared_relu, False),
        ({"swiglu": True}, F.silu, True),
        ({"quick_geglu": True}, quick_gelu, True),
        ({"bias_gelu_fusion": False, "use_te_activation_func": True}, gelu_tanh, False),
    ],
)
def test_activations(args: dict[str, Any], func: Any, gated: bool) -> None:
    found = read(**args).transformer
    assert found["activation_func"] is func
    assert found["gated_linear_unit"] == gated


def test_names_of_old_and_new_releases() -> None:
    assert read(position_embedding_type="learned_absolute", use_rotary_position_embeddings=True) == read(
        position_embedding_type="rope"
    )
    assert read(apply_layernorm_1p=True).transformer["layernorm_zero_centered_gamma"]
    assert read(layernorm_zero_centered_gamma=True).transformer["layernorm_zero_centered_gamma"]
    assert read(layernorm_epsilon=3e-6).transformer["layernorm_epsilon"] == 3e-6
    assert not read(disable_bias_linear=True).transformer["add_bias_linear"]
    assert read(rotary_seq_len_interpolation_factor=4).seq_len_interpolation_factor == 4.0
    assert read(vocab_size=300).vocab_size == 300
    assert read(vocab_size=300, tokenizer_type="NullTokenizer").vocab_size == 384


def enumeration(name: str, value: Any) -> StandIn:
    made = type("StandIn", (StandIn,), {"qualified": name})
    return made(value)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"num_experts": 8}, "num_experts: 8"),
        ({"multi_latent_attention": True}, "multi_latent_attention"),
        ({"mtp_num_layers": 1}, "mtp_num_layers"),
        ({"is_hybrid_model": True}, "is_hybrid_model"),
        ({"hybrid_layer_pattern": "M*M-"}, "hybrid_layer_pattern"),
        ({"hybrid_override_pattern": "M*M-"}, "hybrid_override_pattern"),
        ({"hybrid_attention_ratio": 0.1}, "hybrid_attention_ratio"),
        ({"retro_add_retriever": True}, "retro_add_retriever"),
        ({"heterogeneous_layers_config_path": "x.json"}, "heterogeneous_layers_config_path"),
        ({"use_legacy_models": True}, "use_legacy_models"),
        ({"window_size": (4096, 0)}, "window_size"),
        ({"softmax_type": "learnable"}, "softmax_type"),
        ({"qk_l2_norm": True}, "qk_l2_norm"),
        ({"no_rope_freq": 4}, "no_rope_freq"),
        ({"position_embedding_type": "yarn"}, "position_embedding_type: yarn"),
        ({"position_embedding_type": "relative"}, "position_embedding_type: relative"),
        ({"normalization": "L2Norm"}, "normalization: L2Norm"),
        ({"spec": ["megatron.core.models.mamba.mamba_layer_specs", "mamba_stack_spec"]}, "spec: .*mamba_stack_spec"),
        ({"model_type": enumeration("megatron.core.enums.ModelType", 2)}, "model_type"),
        ({"model_type": enumeration("builtins.getattr", "encoder_and_decoder")}, "model_type"),
        ({"num_layers": None}, "num_layers"),
    ],
)
def test_what_cannot_be_represented_is_refused_by_name(args: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=f"^args .*{words}"):
        read(**args)


def test_what_does_not_matter() -> None:
    inert = {
        "model_type": enumeration("megatron.core.enums.ModelType", 1),
        "attention_backend": enumeration("megatron.core.transformer.enums.AttnBackend", 5),
        "spec": ["megatron.core.models.gpt.gpt_layer_specs", "gpt_layer_spec"],
        "window_size": None,
        "fp8": "hybrid",
        "activation_offload_fraction": 1.0,
        "a_flag_of_some_training_code": 3,
    }
    assert read(**inert) == read()


ROUND_TRIPS = {
    "llama": read(**LLAMA),
    "scaled": read(**LLAMA, use_rope_scaling=True),
    "interpolated": read(**LLAMA, rotary_seq_len_interpolation_factor=2),
    "qk norm, multi-query": read(**LLAMA | {"num_query_groups": 1}, qk_layernorm=True, kv_channels=32),
    "gpt": read(),
    "exact gelu": read(bias_gelu_fusion=False),
    "nemotron": read(squared_relu=True, apply_layernorm_1p=True, rotary_percent=0.5, position_embedding_type="rope"),
    "quick": read(quick_geglu=True),
    "small vocabulary": read(vocab_size=372),
}


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_written_args_are_read_back(name: str) -> None:
    architecture = ROUND_TRIPS[name]
    args = to_args(architecture, torch.bfloat16)
    assert architecture_from_args(args, TENSORS, None, "args") == architecture
    assert launch_flags(architecture)[1] == []
    assert args["bf16"] and args["params_dtype"] is torch.bfloat16


def test_what_the_command_line_has_to_say() -> None:
    flags, missing = launch_flags(read(**LLAMA, norm_epsilon=1e-6, qk_layernorm=True, use_rope_scaling=True))
    assert flags == ["--norm-epsilon", "1e-06", "--qk-layernorm", "--use-rope-scaling"]
    assert not missing
    llama = read(**LLAMA)
    geglu = replace(llama, transformer=llama.transformer | {"activation_func": gelu_tanh})
    assert "gelu_tanh, gated" in launch_flags(geglu)[1][0]
    assert "factor of 8" in launch_flags(replace(llama, rope_scaling=True, rope_scaling_factor=32.0))[1][0]
