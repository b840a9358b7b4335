from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from nemo_spin.errors import CheckpointError
from nemo_spin.megatron.architecture import gelu_tanh, quick_gelu, squared_relu
from nemo_spin.model_io.nemo1.config import ACTIVATIONS, architecture_from_nemo1, to_nemo1_config
from nemo_spin.model_io.stores.interface import EMBEDDING, POSITIONS, StoredTensor

TENSORS = {EMBEDDING: StoredTensor((384, 64), torch.float32), POSITIONS: StoredTensor((128, 64), torch.float32)}
MINIMAL = {"mcore_gpt": True, "num_layers": 2, "hidden_size": 64, "num_attention_heads": 4}


def read(vocab_size: int | None = 372, **config: Any):
    return architecture_from_nemo1(MINIMAL | config, TENSORS, vocab_size, "model_config.yaml")


def test_nemo1_defaults() -> None:
    found = read()
    assert found.transformer == {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_query_groups": 4,
        "ffn_hidden_size": 256,
        "kv_channels": 16,
        "normalization": "LayerNorm",
        "layernorm_epsilon": 1e-5,
        "layernorm_zero_centered_gamma": False,
        "activation_func": gelu_tanh,
        "gated_linear_unit": False,
        "add_bias_linear": True,
        "add_qkv_bias": False,
        "qk_layernorm": False,
        "rotary_interleaved": False,
        "softmax_scale": None,
    }
    assert found.position_embedding_type == "learned_absolute"
    assert found.max_sequence_length == 128
    assert found.share_embeddings_and_output_weights
    assert not found.rope_scaling
    assert (found.vocab_rows, found.vocab_size) == (384, 372)


@pytest.mark.parametrize(
    ("config", "func", "gated"),
    [
        # megatron-core's fused bias and GELU (NeMo's default) is the tanh approximation.
        ({"activation": "gelu"}, gelu_tanh, False),
        ({"activation": "gelu", "bias_activation_fusion": False}, F.gelu, False),
        ({"activation": "geglu", "bias_activation_fusion": False}, F.gelu, True),
        ({"activation": "fast-geglu"}, gelu_tanh, True),
        ({"activation": "geglu", "openai_gelu": True, "bias_activation_fusion": False}, gelu_tanh, True),
        ({"activation": "swiglu"}, F.silu, True),
        ({"activation": "fast-swiglu"}, F.silu, True),
        ({"activation": "reglu"}, F.relu, True),
        ({"activation": "squared-relu"}, squared_relu, False),
        ({"activation": "approx-gelu"}, quick_gelu, False),
    ],
)
def test_activations(config: dict, func: Any, gated: bool) -> None:
    transformer = read(**config).transformer
    assert (transformer["activation_func"], transformer["gated_linear_unit"]) == (func, gated)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"normalization": "rmsnorm"}, ("RMSNorm", False)),
        ({"normalization": "layernorm1p"}, ("LayerNorm", True)),
        ({"normalization": "low_precision_layernorm"}, ("LayerNorm", False)),
        ({"normalization": "rmsnorm", "layernorm_zero_centered_gamma": True}, ("RMSNorm", True)),
    ],
)
def test_normalizations(config: dict, expected: tuple[str, bool]) -> None:
    transformer = read(**config).transformer
    assert (transformer["normalization"], transformer["layernorm_zero_centered_gamma"]) == expected


def test_keys_that_change_the_computation_are_honoured() -> None:
    found = read(
        position_embedding_type="rope",
        rotary_percentage=0.25,
        rotary_base="1e6",
        rotary_interleaved=True,
        scale_positional_embedding=True,
        seq_len_interpolation_factor=2,
        encoder_seq_length=8192,
        kv_channels=32,
        num_query_groups=2,
        ffn_hidden_size=100,
        layernorm_epsilon="1e-06",
        bias=False,
        qkv_bias=True,
        qk_layernorm=True,
        softmax_scale=0.5,
        share_embeddings_and_output_weights=False,
        apply_query_key_layer_scaling=True,
    )
    assert (found.rotary_percent, found.rotary_base, found.seq_len_interpolation_factor) == (0.25, 1e6, 2.0)
    assert found.rope_scaling
    assert found.rope_scaling_factor == 8.0
    assert found.max_sequence_length == 8192
    assert not found.share_embeddings_and_output_weights
    honoured = {
        "rotary_interleaved": True,
        "kv_channels": 32,
        "num_query_groups": 2,
        "ffn_hidden_size": 100,
        "layernorm_epsilon": 1e-6,
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "qk_layernorm": True,
        "softmax_scale": 0.5,
    }
    assert honoured.items() <= found.transformer.items()
    assert to_nemo1_config(found, "bf16")["precision"] == "bf16"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"mcore_gpt": False}, "mcore_gpt"),
        ({"num_layers": None}, "no num_layers"),
        ({"target": "nemo.collections.nlp.models.language_modeling.megatron_t5_model.MegatronT5Model"}, "no GPT"),
        ({"name": "megatron_gemma2"}, "name: megatron_gemma2"),
        ({"activation": "gelu-new"}, "activation: gelu-new"),
        ({"normalization": "batchnorm"}, "normalization: batchnorm"),
        ({"position_embedding_type": "alibi"}, "position_embedding_type: alibi"),
        ({"transformer_block_type": "post_ln"}, "transformer_block_type: post_ln"),
        ({"normalize_attention_scores": False}, "normalize_attention_scores"),
        ({"attention_type": "multiquery"}, "attention_type"),
        ({"headscale": True}, "headscale"),
        ({"apply_embedding_scaling": True}, "apply_embedding_scaling"),
        ({"drop_layers": [3]}, "drop_layers"),
        ({"num_moe_experts": 8}, "num_moe_experts: 8, and a mixture of experts is not supported"),
        ({"window_size": [4096, 0]}, "window_size"),
        ({"multi_latent_attention": True}, "multi_latent_attention"),
        ({"scale_positional_embedding": True, "old_context_len": 4096}, "old_context_len: 4096"),
        ({"scale_positional_embedding": True, "high_freq_factor": 2}, "high_freq_factor: 2"),
        ({"mcore_customization_config": {"final_logit_softcapping": 30}}, "final_logit_softcapping: 30"),
    ],
)
def test_what_cannot_be_represented_is_refused_by_name(config: dict, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        read(**config)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("normalization", ["layernorm", "layernorm1p", "rmsnorm"])
def test_what_is_written_is_read_back(activation: str, normalization: str) -> None:
    config = {
        "activation": activation,
        "normalization": normalization,
        "position_embedding_type": "rope",
        "scale_positional_embedding": True,
        "scale_factor": 32.0,
        "qkv_bias": True,
    }
    found = read(**config)
    assert found.rope_scaling_factor == 32.0
    assert architecture_from_nemo1(to_nemo1_config(found, "32"), TENSORS, None, "it") == found


# What activation_to_func of nemo_toolkit 2.4.1 accepts: it decides whether NeMo 1 can open what is written here.
OF_NEMO_1 = "gelu geglu reglu swiglu squared-relu fast-geglu fast-swiglu fast-reglu approx-gelu".split()


@pytest.mark.parametrize("activation", [*OF_NEMO_1, "gelu-tanh", "tanh-geglu"])
def test_activations_that_nemo_1_has_are_written_under_its_names(activation: str) -> None:
    written = to_nemo1_config(read(activation=activation), "32")
    assert written["activation"] in OF_NEMO_1
    # The tanh approximation of GELU, which is also what NeMo 1's defaults compute.
    assert written["openai_gelu"] == ("ge" in activation and activation != "approx-gelu")


def test_archives_of_before_the_name_of_the_scaling_factor() -> None:
    assert read(scale_positional_embedding=True, rope_scaling_factor=16.0).rope_scaling_factor == 16.0
