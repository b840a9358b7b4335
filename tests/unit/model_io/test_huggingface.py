"""config.json, in the spellings of transformers 4 and 5, to an Architecture and back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from huggingface_models import MODELS, SIZES

from nemo_spin.errors import CheckpointError
from nemo_spin.megatron.architecture import Architecture, gelu_tanh, parameter_count
from nemo_spin.model_io.huggingface.config import DEFAULTS, architecture_from_huggingface, read_huggingface_config
from nemo_spin.model_io.huggingface.export import to_huggingface_config, write_huggingface_config

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def read(model_type: str = "llama", **config: Any) -> Architecture:
    return architecture_from_huggingface(SIZES | {"model_type": model_type} | config, "it: config.json")


def transformers_config(model_type: str, **given: Any) -> dict[str, Any]:
    from transformers import AutoConfig

    return AutoConfig.for_model(model_type, **given).to_dict()


@pytest.mark.parametrize("model_type", DEFAULTS)
def test_what_is_left_out_is_as_in_transformers(model_type: str) -> None:
    everything = transformers_config(model_type)
    assert len(everything) > 15
    ours = architecture_from_huggingface({"model_type": model_type}, "it")
    assert ours == architecture_from_huggingface(everything, "it")


@pytest.mark.parametrize("name", MODELS)
def test_a_configuration_of_ours_is_read_back(name: str) -> None:
    family, given = MODELS[name]
    written = transformers_config(family.lower(), **SIZES | given)
    architecture = architecture_from_huggingface(written, "it")
    ours = to_huggingface_config(architecture, torch.bfloat16, bos_token_id=1, eos_token_id=[2, 3])
    assert architecture_from_huggingface(json.loads(json.dumps(ours)), "it") == architecture
    again = transformers_config(ours["model_type"], **{key: ours[key] for key in ours if key != "model_type"})
    assert architecture_from_huggingface(again, "it") == architecture
    assert (ours["eos_token_id"], ours["torch_dtype"]) == ([2, 3], "bfloat16")


@pytest.mark.parametrize(
    ("config", "published"),
    [
        # Llama-3.1-8B, Llama-3.2-1B, Mistral-7B-v0.1, Qwen2.5-7B, Qwen3-0.6B: what their config.json says beyond the
        # defaults, and the number of parameters that their publishers give.
        (
            {"model_type": "llama", "intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256},
            8_030_261_248,
        ),
        (
            {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
            | {"num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True},
            1_235_814_400,
        ),
        ({"model_type": "mistral"}, 7_241_732_096),
        (
            {"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
            | {"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064},
            7_615_616_512,
        ),
        (
            {"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28}
            | {"num_attention_heads": 16, "num_key_value_heads": 8, "tie_word_embeddings": True},
            596_049_920,
        ),
    ],
)
def test_published_models_have_their_number_of_parameters(config: dict[str, Any], published: int) -> None:
    assert parameter_count(architecture_from_huggingface(config, "it")) == published


def test_both_spellings_of_rope() -> None:
    old = read(rope_theta=5e5, rope_scaling={"type": "llama3", **LLAMA3})
    new = read(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3})
    assert old == new
    assert (new.rotary_base, new.rope_scaling, new.rope_scaling_factor) == (5e5, True, 8.0)
    linear = read(rope_scaling={"type": "linear", "factor": 4})
    assert (linear.seq_len_interpolation_factor, linear.rope_scaling) == (4.0, False)
    assert read(rope_scaling={"type": "default"}) == read(rope_scaling=None) == read()


@pytest.mark.parametrize(
    ("model_type", "config", "length"),
    [
        ("mistral", {"sliding_window": 128}, 128),
        ("mistral", {"sliding_window": None}, 512),
        ("mistral", {"max_position_embeddings": 8192}, 4096),
        ("qwen2", {"sliding_window": 128}, 512),
        ("qwen2", {"sliding_window": 128, "use_sliding_window": True}, 512),
        ("qwen2", {"sliding_window": 128, "use_sliding_window": True, "max_window_layers": 1}, 128),
        ("qwen3", {"sliding_window": 128, "use_sliding_window": True, "max_window_layers": 0}, 128),
        ("qwen3", {"sliding_window": 128, "use_sliding_window": True, "layer_types": ["full_attention"] * 2}, 512),
        ("llama", {"sliding_window": 128}, 512),
    ],
)
def test_a_window_limits_the_length(model_type: str, config: dict[str, Any], length: int) -> None:
    assert read(model_type, **config).max_sequence_length == length


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "gemma3"}, "gemma3, which is not read directly.*AutoBridge"),
        ({"model_type": None}, "model_type: None"),
        ({"model_type": ["llama"]}, "model_type: "),
        ({"quantization_config": {"quant_method": "fp8"}}, r"quantization_config \(fp8\)"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "which is no causal language model"),
        ({"hidden_act": "gelu"}, "hidden_act: gelu"),
        ({"attention_bias": True}, "attention_bias: True and mlp_bias: False"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type: yarn"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "dynamic"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 4.0}}, "rope_parameters.rope_type: longrope"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor: None"),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 2}}, "high_freq_factor: 2"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}}, "512"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "one setting for all layers"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5"),
        ({"vocab_size": "32k"}, "vocab_size: 32k"),
        ({"max_position_embeddings": "4k"}, "max_position_embeddings: 4k"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps: small"),
        ({"num_key_value_heads": 3}, "num_query_groups 3"),
    ],
)
def test_what_is_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        read(**config)


def test_directories_without_a_whole_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        read_huggingface_config(tmp_path, "it")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="no mapping"):
        read_huggingface_config(tmp_path, "it")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="merge it into its base model"):
        read_huggingface_config(tmp_path, "it")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"normalization": "LayerNorm"}, "normalization LayerNorm"),
        ({"activation_func": gelu_tanh}, "activation gelu_tanh"),
        ({"gated_linear_unit": False}, "without a gate"),
        ({"layernorm_zero_centered_gamma": True}, "layernorm_zero_centered_gamma"),
        ({"rotary_interleaved": True}, "rotary_interleaved"),
        ({"softmax_scale": 1.0}, "softmax_scale 1.0"),
        ({"qk_layernorm": True, "add_qkv_bias": True}, "qk_layernorm with biases"),
        ({"rotary_percent": 0.5}, "rotary_percent 0.5"),
        ({"position_embedding_type": "learned_absolute"}, "position_embedding_type learned_absolute"),
        ({"rope_scaling": True, "seq_len_interpolation_factor": 2.0}, "rope_scaling together"),
    ],
)
def test_what_no_class_computes(fields: dict[str, Any], words: str) -> None:
    architecture = read()
    assert architecture.transformer["activation_func"] is F.silu
    inner = {key: value for key, value in fields.items() if key in architecture.transformer}
    outer = {key: value for key, value in fields.items() if key not in inner}
    with pytest.raises(CheckpointError, match=f"{words}.*Megatron-Bridge"):
        to_huggingface_config(
            replace(architecture, transformer=architecture.transformer | inner, **outer), torch.float32
        )


def test_generation_config_holds_what_is_known(tmp_path: Path) -> None:
    write_huggingface_config(read(), torch.float32, tmp_path, eos_token_id=[1, 2])
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"eos_token_id": [1, 2]}
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["torch_dtype"]) == (None, [1, 2], "float32")
