from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml

from nemo_spin.errors import CheckpointError
from nemo_spin.megatron.architecture import Architecture, gelu_tanh, quick_gelu, squared_relu
from nemo_spin.model_io.megatron_lm.bridge import architecture_from_run_config, refuse_adapters, to_run_config
from nemo_spin.model_io.stores.interface import EMBEDDING, POSITIONS, StoredTensor

TENSORS = {EMBEDDING: StoredTensor((384, 64), torch.bfloat16), POSITIONS: StoredTensor((128, 64), torch.bfloat16)}
BRIDGE = "megatron.bridge.models."
# As Megatron-Bridge 0.3 and 0.6 write it, without the fields that are null or false.
MODEL = yaml.safe_load("""
_target_: megatron.bridge.models.gpt_provider.GPTModelProvider
activation_func: {_call_: false, _target_: torch.nn.functional.silu}
activation_offload_fraction: 1.0
add_bias_linear: false
add_qkv_bias: false
attention_backend: {_args_: [5], _call_: true, _name_: auto, _target_: megatron.core.transformer.enums.AttnBackend}
bias_activation_fusion: true
cuda_graph_modules: full
ffn_hidden_size: 160
fp4_recipe: nvfp4
gated_linear_unit: true
gtp_weight_remat_size: 1
hf_model_id: meta-llama/Llama-3.2-1B
hidden_size: 64
init_method_std: 0.02
kitchen_attention_backend: sdpa
kv_channels: null
layernorm_epsilon: 1.0e-05
make_vocab_size_divisible_by: 128
min_offloaded_tensor_size: 1048576
moe_router_topk: 2
normalization: RMSNorm
num_attention_heads: 4
num_layers: 2
num_query_groups: 2
params_dtype: {_call_: false, _target_: torch.bfloat16}
position_embedding_type: rope
rope_scaling: true
rope_scaling_factor: 32.0
rotary_base: 500000
rotary_percent: 1.0
seq_length: 4096
share_embeddings_and_output_weights: false
should_pad_vocab: true
softmax_type: vanilla
transformer_layer_spec: {_call_: false, _target_: megatron.bridge.models.gpt_provider.default_layer_spec}
vocab_size: 372
yarn_beta_fast: 32.0
""")


def read(tokenizer_size: int | None = None, **model: Any) -> Architecture:
    config = {"model": MODEL | model, "tokenizer": None, "peft": None}
    return architecture_from_run_config(config, TENSORS, tokenizer_size, "run_config.yaml")


def test_a_llama() -> None:
    found = read()
    assert found.transformer["activation_func"] is F.silu
    assert (found.transformer["kv_channels"], found.transformer["num_query_groups"]) == (16, 2)
    assert (found.vocab_rows, found.vocab_size, found.max_sequence_length) == (384, 372, 4096)
    assert (found.rope_scaling, found.rope_scaling_factor, found.rotary_base) == (True, 32.0, 500000)
    assert not found.share_embeddings_and_output_weights
    # The providers' default factor, 1.0, says nothing where scaling is off.
    assert read(rope_scaling=False, rope_scaling_factor=1.0).rope_scaling_factor == 8.0
    assert read(300, vocab_size=None).vocab_size == 300


@pytest.mark.parametrize(
    "target",
    [
        "gpt_provider.GPTProvider175B",
        "llama.llama_provider.LlamaModelProvider",
        "llama.llama_provider.Llama31ModelProvider8B",
        "llama.llama_provider.Llama32ModelProvider1B",
        "llama_nemotron.llama_nemotron_provider.Llama31NemotronNano8BProvider",
        "qwen.qwen_provider.Qwen2ModelProvider1P5B",
        "qwen.qwen_provider.Qwen25ModelProvider500M",
        "qwen.qwen_provider.Qwen3ModelProvider600M",
        "mistral.mistral_provider.MistralModelProvider",
        "nemotron.nemotron_provider.Nemotron4ModelProvider340B",
    ],
)
def test_providers_of_a_plain_gpt(target: str) -> None:
    assert read(_target_=BRIDGE + target) == read()


def test_the_configuration_that_succeeds_the_providers() -> None:
    outer = {"vocab_size", "seq_length", "share_embeddings_and_output_weights", "position_embedding_type"}
    outer |= {name for name in MODEL if name.startswith("ro")} | {"should_pad_vocab", "make_vocab_size_divisible_by"}
    transformer = {name: value for name, value in MODEL.items() if name not in outer}
    model = {name: MODEL[name] for name in outer} | {
        "_target_": "megatron.training.models.gpt.GPTModelConfig",
        "_builder_": "megatron.training.models.gpt.GPTModelBuilder",
        "transformer": transformer | {"_target_": BRIDGE + "transformer_config.TransformerConfig"},
    }
    found = architecture_from_run_config({"model": model}, TENSORS, None, "run_config.yaml")
    assert found == read()
    # It does not store functions.
    del model["transformer"]["activation_func"]
    with pytest.raises(CheckpointError, match=r"model\.activation_func"):
        architecture_from_run_config({"model": model}, TENSORS, None, "run_config.yaml")


@pytest.mark.parametrize(
    ("node", "func"),
    [
        ({"_target_": "torch._C._nn.gelu", "_call_": False}, F.gelu),
        ({"_target_": "torch._C._nn.gelu", "_partial_": True, "_args_": [], "approximate": "tanh"}, gelu_tanh),
        ({"_target_": "megatron.core.activations.fast_gelu", "_call_": False}, gelu_tanh),
        ({"_target_": "megatron.core.activations.squared_relu", "_call_": False}, squared_relu),
        ({"_target_": "megatron.core.activations.quick_gelu", "_call_": False}, quick_gelu),
    ],
)
def test_activations(node: dict[str, Any], func: Any) -> None:
    assert read(activation_func=node, bias_activation_fusion=False).transformer["activation_func"] is func


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"_target_": BRIDGE + "gemma.gemma_provider.GemmaModelProvider"}, "GemmaModelProvider"),
        ({"_target_": BRIDGE + "gemma.gemma_provider.GemmaModelProvider2B"}, "GemmaModelProvider2B"),
        ({"_target_": BRIDGE + "qwen.qwen_provider.Qwen3MoEModelProvider30B_A3B"}, "Qwen3MoEModelProvider"),
        ({"_target_": BRIDGE + "qwen_vl.qwen3_vl_provider.Qwen3VLModelProvider"}, "Qwen3VLModelProvider"),
        ({"_target_": BRIDGE + "mamba.mamba_provider.MambaModelProvider"}, "MambaModelProvider"),
        ({"_target_": BRIDGE + "llama.llama_provider.Llama4ModelProvider"}, "Llama4ModelProvider"),
        (
            {"_target_": BRIDGE + "ministral3.ministral3_provider.Ministral3ModelProvider3B"},
            "Ministral3ModelProvider3B",
        ),
        ({"_target_": BRIDGE + "t5_provider.T5ModelProvider"}, "T5ModelProvider"),
        ({"_target_": BRIDGE + "gpt_provider.GPTModelProviderOfTomorrow"}, "GPTModelProviderOfTomorrow"),
        ({"_target_": "my_project.GPTModelProvider"}, "my_project.GPTModelProvider"),
        ({"num_moe_experts": 8}, "num_moe_experts: 8"),
        ({"window_size": [4096, 0]}, "window_size"),
        ({"position_embedding_type": "yarn"}, "position_embedding_type: yarn"),
        ({"restore_modelopt_state": True}, "restore_modelopt_state"),
        ({"dense_grouped_gemm": True}, "dense_grouped_gemm"),
        ({"activation_func": {"_target_": "os.system", "_call_": False}}, "activation_func: os.system"),
        ({"activation_func": {"_target_": "torch._C._nn.gelu", "approximate": "sin"}}, "approximate=sin"),
        ({"num_layers": None}, r"model\.num_layers"),
    ],
)
def test_what_cannot_be_represented_is_refused_by_name(model: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        read(**model)


def test_what_is_no_model() -> None:
    with pytest.raises(CheckpointError, match="has no model"):
        architecture_from_run_config({}, TENSORS, None, "run_config.yaml")
    with pytest.raises(CheckpointError, match=r"LoRA.*merge"):
        refuse_adapters({"peft": {"_target_": "megatron.bridge.peft.lora.LoRA"}}, "run_config.yaml")


@pytest.mark.parametrize("func", [F.silu, F.gelu, F.relu, squared_relu, quick_gelu, gelu_tanh])
@pytest.mark.parametrize("gated", [True, False])
def test_written_configurations_are_read_back(func: Any, gated: bool) -> None:
    other = read(qk_layernorm=True, add_qkv_bias=True, rotary_percent=0.5, seq_len_interpolation_factor=2.0)
    architecture = replace(
        other, transformer=other.transformer | {"activation_func": func, "gated_linear_unit": gated}, vocab_size=300
    )
    config = yaml.safe_load(yaml.safe_dump(to_run_config(architecture, torch.bfloat16, {"tokenizer_type": "x"})))
    assert architecture_from_run_config(config, TENSORS, None, "run_config.yaml") == architecture
    # 300 tokens are padded to the 384 rows that are stored.
    assert config["model"]["make_vocab_size_divisible_by"] == 128
    assert config["model"]["params_dtype"]["_target_"] == "torch.bfloat16"
