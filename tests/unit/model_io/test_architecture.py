from __future__ import annotations

from dataclasses import replace

import pytest

from nemo_spin.errors import CheckpointError, ConfigError
from nemo_spin.megatron.architecture import Architecture, check_layout, parameter_count, transformer_fields

FIELDS = {
    "num_layers": 6,
    "hidden_size": 96,
    "num_attention_heads": 12,
    "num_query_groups": 4,
    "ffn_hidden_size": 200,
    "kv_channels": None,
    "normalization": "RMSNorm",
    "layernorm_epsilon": 1e-5,
    "layernorm_zero_centered_gamma": False,
    "activation_func": abs,
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "qk_layernorm": True,
    "rotary_interleaved": False,
    "softmax_scale": None,
}
LLAMA = Architecture(transformer_fields(**FIELDS), 100, 99, 64, "rope")


def test_parameters_are_counted() -> None:
    attention = 96 * (96 + 2 * 4 * 8) + (96 + 2 * 4 * 8) + 96 * 96 + 2 * 8
    layer = attention + 3 * 96 * 200 + 2 * 96
    assert parameter_count(LLAMA) == 6 * layer + 2 * 100 * 96 + 96
    tied = replace(LLAMA, share_embeddings_and_output_weights=True)
    assert parameter_count(LLAMA) - parameter_count(tied) == 100 * 96


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 3), (4, 6)])
def test_layouts_that_divide(tp: int, pp: int) -> None:
    check_layout(LLAMA, tp, pp, sequence_parallel=tp > 1)


@pytest.mark.parametrize(
    ("tp", "pp", "sequence_parallel", "words"),
    [
        (8, 1, False, "12 attention heads"),
        (3, 1, False, "4 query groups"),
        (1, 4, False, "6 layers"),
        (1, 1, True, "sequence_parallel"),
    ],
)
def test_layouts_that_do_not(tp: int, pp: int, sequence_parallel: bool, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_layout(LLAMA, tp, pp, sequence_parallel)


def test_a_feed_forward_layer_that_does_not_divide() -> None:
    odd = Architecture(transformer_fields(**FIELDS | {"ffn_hidden_size": 201}), 100, 99, 64, "rope")
    with pytest.raises(ConfigError, match="201 channels"):
        check_layout(odd, 2, 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_query_groups": 5}, "no multiple of num_query_groups 5"),
        ({"num_layers": "${num}"}, r"num_layers: \$\{num\}"),
        ({"num_attention_heads": 7, "num_query_groups": None}, "kv_channels is not given"),
    ],
)
def test_numbers_that_contradict_each_other(change: dict, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        transformer_fields(**FIELDS | change)
