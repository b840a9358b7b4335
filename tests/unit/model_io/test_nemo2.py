from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from nemo_spin.errors import CheckpointError
from nemo_spin.megatron.architecture import gelu_tanh, quick_gelu, squared_relu
from nemo_spin.model_io.nemo1.config import architecture_from_nemo1, to_nemo1_config
from nemo_spin.model_io.nemo2.config import architecture_from_nemo2
from nemo_spin.model_io.stores.interface import EMBEDDING, StoredTensor

TENSORS = {EMBEDDING: StoredTensor((384, 64), torch.bfloat16)}
GPT = "nemo.collections.llm.gpt.model."


def callable_(name: str) -> dict[str, Any]:
    return {"_target_": name, "_call_": False}


CONFIG = {
    "_target_": GPT + "llama.LlamaConfig",
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 160,
    "kv_channels": None,
    "normalization": "RMSNorm",
    "layernorm_epsilon": 1e-6,
    "activation_func": callable_("torch.nn.functional.silu"),
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "position_embedding_type": "rope",
    "rotary_base": 500000,
    "share_embeddings_and_output_weights": False,
    "seq_length": 4096,
    "vocab_size": 372,
    "transformer_layer_spec": callable_(GPT + "base.default_layer_spec"),
}


def read(tokenizer_size: int | None = None, model: dict[str, Any] | None = None, **config: Any):
    context = {"_target_": GPT + "llama.LlamaModel", "config": CONFIG | config, "model_transform": None}
    return architecture_from_nemo2(context | (model or {}), TENSORS, tokenizer_size, "context/model.yaml")


def test_a_llama() -> None:
    found = read()
    assert found.transformer["activation_func"] is F.silu
    assert found.transformer["gated_linear_unit"]
    assert found.transformer["kv_channels"] == 16
    assert found.transformer["num_query_groups"] == 2
    assert found.transformer["add_qkv_bias"]
    assert not found.transformer["add_bias_linear"]
    assert (found.vocab_rows, found.vocab_size, found.max_sequence_length) == (384, 372, 4096)
    assert found.rotary_base == 500000
    assert not found.rope_scaling
    # The configuration's vocabulary counts; the tokenizer's where there is none.
    assert read(300).vocab_size == 372
    assert read(300, vocab_size=None).vocab_size == 300


@pytest.mark.parametrize(
    ("name", "func"),
    [
        ("torch.nn.functional.silu", F.silu),
        ("torch._C._nn.gelu", F.gelu),
        ("torch.nn.functional.gelu", F.gelu),
        ("torch.nn.functional.relu", F.relu),
        ("megatron.core.activations.squared_relu", squared_relu),
        ("nemo.collections.nlp.modules.common.megatron.utils.squared_relu", squared_relu),
        ("megatron.core.activations.quick_gelu", quick_gelu),
        ("nemo.collections.llm.fn.activation.openai_gelu", gelu_tanh),
    ],
)
def test_activations_by_name(name: str, func: Any) -> None:
    assert read(activation_func=callable_(name)).transformer["activation_func"] is func


def test_fused_gelu_is_the_tanh_approximation() -> None:
    found = read(activation_func=callable_("torch._C._nn.gelu"), bias_activation_fusion=True)
    assert found.transformer["activation_func"] is gelu_tanh


def test_llama31_scaling() -> None:
    scaled = {"scale_factor": 32, "low_freq_factor": 1, "high_freq_factor": 4, "old_context_len": 8192}
    found = read(**scaled, _target_=GPT + "llama.Llama32Config1B")
    assert found.rope_scaling
    assert found.rope_scaling_factor == 32.0
    assert architecture_from_nemo1(to_nemo1_config(found, "32"), TENSORS, None, "it") == found
    with pytest.raises(CheckpointError, match="old_context_len: 4096"):
        read(**scaled | {"old_context_len": 4096})


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"_target_": GPT + "gemma.GemmaConfig"}, "gemma.GemmaConfig"),
        ({"_target_": GPT + "ssm.BaseMambaConfig130M"}, "ssm.BaseMambaConfig130M"),
        ({"_target_": "my_project.Config"}, "my_project.Config"),
        ({"num_moe_experts": 8}, "num_moe_experts: 8"),
        ({"multi_latent_attention": True}, "multi_latent_attention"),
        ({"mtp_num_layers": 1}, "mtp_num_layers"),
        ({"window_size": [4096, 0]}, "window_size"),
        ({"heterogeneous_block_specs": True}, "heterogeneous_block_specs"),
        ({"softmax_type": "learnable"}, "softmax_type"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"a_field_of_the_future": 3}, "a_field_of_the_future: 3"),
        ({"position_embedding_type": "yarn"}, "position_embedding_type: yarn"),
        ({"normalization": "L2Norm"}, "normalization: L2Norm"),
        ({"activation_func": callable_("my_project.gelu")}, "activation_func: my_project.gelu"),
        ({"activation_func": callable_("os.system")}, "activation_func: os.system"),
        ({"transformer_layer_spec": callable_("my_project.spec")}, "transformer_layer_spec: my_project.spec"),
        ({"num_layers": None}, "config.num_layers"),
    ],
)
def test_what_cannot_be_represented_is_refused_by_name(config: dict, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        read(**config)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"_target_": "nemo.collections.llm.t5.model.t5.T5Model"}, "T5Model"),
        ({"model_transform": {"_target_": "nemo.collections.llm.peft.lora.LoRA"}}, "LoRA"),
        ({"config": None}, "no config"),
    ],
)
def test_models_that_are_no_plain_gpt(model: dict, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        read(model=model)


def test_how_a_model_was_trained_and_sped_up_does_not_matter() -> None:
    inert = {
        "tp_comm_overlap": True,
        "fp8": "hybrid",
        "tensor_model_parallel_size": 8,
        "hidden_dropout": 0.1,
        "cuda_graph_impl": "local",
        "moe_aux_loss_coeff": 0.1,
        "init_method_std": 0.01,
        "attention_backend": {"_target_": "megatron.core.transformer.enums.AttnBackend", "_call_": True},
        "inference_sampling_seed": 7,
    }
    assert read(**inert) == read()
