"""Architectures as configurations describe them compute what transformers computes with the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Workers
from test_checkpoints import logits

from nemo_spin.megatron.architecture import Architecture
from nemo_spin.megatron.gpt import build_gpt
from nemo_spin.model_io.huggingface.weights import HuggingFaceStore
from nemo_spin.model_io.nemo1.config import architecture_from_nemo1
from nemo_spin.model_io.nemo2.config import architecture_from_nemo2
from nemo_spin.model_io.stores.interface import EMBEDDING, StoredTensor
from nemo_spin.model_io.weights import load_weights

ROWS, HIDDEN, HEADS, GROUPS = 50, 32, 4, 2
SIZES = {
    "vocab_size": ROWS,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
NEMO = "nemo.collections.llm.gpt.model."
NEMO2 = {
    "num_layers": 2,
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_query_groups": GROUPS,
    "ffn_hidden_size": 48,
    "normalization": "RMSNorm",
    "layernorm_epsilon": 1e-6,
    "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "share_embeddings_and_output_weights": False,
    "seq_length": 64,
}


def from_nemo2(config_class: str, model_class: str, **config: Any) -> Architecture:
    context = {"_target_": NEMO + model_class, "config": NEMO2 | config | {"_target_": NEMO + config_class}}
    return architecture_from_nemo2(context, {EMBEDDING: StoredTensor((ROWS, HIDDEN), torch.float32)}, ROWS, "it")


def from_nemo1(**config: Any) -> Architecture:
    flat = {"mcore_gpt": True, "num_layers": 2, "hidden_size": HIDDEN, "num_attention_heads": HEADS} | config
    return architecture_from_nemo1(flat, {EMBEDDING: StoredTensor((ROWS, HIDDEN), torch.float32)}, ROWS, "it")


def llama31() -> tuple[Any, Architecture]:
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(**SIZES, rope_parameters=rope, rms_norm_eps=1e-6)
    return LlamaForCausalLM(config), from_nemo1(
        num_query_groups=GROUPS,
        ffn_hidden_size=48,
        normalization="rmsnorm",
        layernorm_epsilon=1e-6,
        activation="fast-swiglu",
        bias=False,
        position_embedding_type="rope",
        scale_positional_embedding=True,
        share_embeddings_and_output_weights=False,
    )


def llama32() -> tuple[Any, Architecture]:
    model, _ = llama31()
    model.config.rope_parameters["factor"] = 32.0
    scaling = {"scale_factor": 32, "low_freq_factor": 1, "high_freq_factor": 4, "old_context_len": 8192}
    tied = {"share_embeddings_and_output_weights": True, "rotary_base": 10000}
    config = type(model.config)(**model.config.to_dict() | {"tie_word_embeddings": True})
    return type(model)(config), from_nemo2("llama.Llama32Config1B", "llama.LlamaModel", **scaling, **tied)


def qwen2() -> tuple[Any, Architecture]:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 1e6}, rms_norm_eps=1e-6)
    return Qwen2ForCausalLM(config), from_nemo2(
        "qwen2.Qwen2Config500M", "qwen2.Qwen2Model", add_qkv_bias=True, rotary_base=1e6
    )


def qwen3() -> tuple[Any, Architecture]:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(**SIZES, head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    return Qwen3ForCausalLM(config), from_nemo2(
        "qwen3.Qwen3Config600M", "qwen3.Qwen3Model", qk_layernorm=True, kv_channels=16, rotary_base=1e6
    )


def nemotron() -> tuple[Any, Architecture]:
    from transformers import NemotronConfig, NemotronForCausalLM

    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    config = NemotronConfig(**SIZES, head_dim=8, rope_parameters=rope, norm_eps=1e-5, hidden_act="relu2")
    return NemotronForCausalLM(config), from_nemo1(
        num_query_groups=GROUPS,
        ffn_hidden_size=48,
        normalization="layernorm1p",
        activation="squared-relu",
        bias=False,
        position_embedding_type="rope",
        rotary_percentage=0.5,
        share_embeddings_and_output_weights=False,
    )


@torch.no_grad()
def difference(make: Any, directory: Path) -> float:
    torch.manual_seed(0)
    theirs, architecture = make()
    for parameter in theirs.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    theirs.save_pretrained(directory)
    ours = build_gpt(architecture, "32")
    load_weights(ours, HuggingFaceStore(directory, architecture, "it"), "it")
    ids = torch.randint(0, ROWS, (2, 40))
    found = logits(ours, ids)
    assert found is not None
    return float((found - theirs.eval()(ids).logits).abs().max())


@pytest.mark.parametrize("make", [llama31, llama32, qwen2, qwen3, nemotron])
def test_logits_are_those_of_transformers(workers: Workers, tmp_path: Path, make: Any) -> None:
    assert workers.run(difference, make, tmp_path)[0] < 1e-4
