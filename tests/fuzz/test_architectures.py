"""Whatever a foreign checkpoint's description says: an architecture that could be built, or one sentence."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from config_inputs import ANYTHING
from fuzzing import Fuzz, check_sentence
from hypothesis import strategies as st

from nemo_spin.errors import CheckpointError
from nemo_spin.megatron.architecture import Architecture, parameter_count, transformer_fields
from nemo_spin.model_io.huggingface.config import architecture_from_huggingface
from nemo_spin.model_io.megatron_lm.args import architecture_from_args, to_args
from nemo_spin.model_io.megatron_lm.bridge import architecture_from_run_config, to_run_config
from nemo_spin.model_io.nemo1.config import architecture_from_nemo1, to_nemo1_config
from nemo_spin.model_io.nemo2.config import architecture_from_nemo2
from nemo_spin.model_io.nemo2.context import describe_model
from nemo_spin.model_io.stores.interface import EMBEDDING, StoredTensor

TINY = Architecture(
    transformer=transformer_fields(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=64,
        kv_channels=8,
        normalization="RMSNorm",
        layernorm_epsilon=1e-5,
        layernorm_zero_centered_gamma=False,
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        add_qkv_bias=False,
        qk_layernorm=False,
        rotary_interleaved=False,
        softmax_scale=None,
    ),
    vocab_rows=128,
    vocab_size=100,
    max_sequence_length=64,
    position_embedding_type="rope",
)
TENSORS = {EMBEDDING: StoredTensor((128, 32), torch.float32)}
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "vocab_size": 100,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "tie_word_embeddings": False,
}
# family -> (a description of a tiny model, what reads it)
FAMILIES: dict[str, tuple[dict[str, Any], Callable[..., Architecture]]] = {
    "nemo1": (to_nemo1_config(TINY, "32"), architecture_from_nemo1),
    "nemo2": (describe_model(TINY, torch.float32, None), architecture_from_nemo2),
    "megatron": (to_args(TINY, torch.float32), architecture_from_args),
    "bridge": (to_run_config(TINY, torch.float32, None), architecture_from_run_config),
    "huggingface": (LLAMA, lambda config, tensors, vocab_size, where: architecture_from_huggingface(config, where)),
}
MORE = ["window_size", "seq_len_interpolation_factor", "scale_factor", "softmax_scale", "old_context_len", 1]


@st.composite
def descriptions(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """(family, a description with something else in one or two of its fields)."""
    family = draw(st.sampled_from(sorted(FAMILIES)))
    description = deepcopy(FAMILIES[family][0])
    for _ in range(draw(st.integers(0, 2))):
        node = description
        for section in ("model", "config", "rope_scaling"):
            if isinstance(node.get(section), dict) and draw(st.integers(0, 5)):
                node = node[section]
        node[draw(st.sampled_from([*node, *MORE]))] = draw(ANYTHING)
    return family, description


def test_architectures(fuzz: Fuzz) -> None:
    tally = fuzz(descriptions(), lambda given: check_description(*given), number=200)
    assert tally.outcomes["read"] > 0.03 * tally.tried and tally.outcomes["refused"] > 0.03 * tally.tried


def check_description(family: str, description: Mapping[str, Any]) -> str:
    try:
        read = FAMILIES[family][1](description, TENSORS, 100, "the description")
    except CheckpointError as error:
        check_sentence(error)
        return "refused"
    numbers = [read.rotary_percent, read.rotary_base, read.rope_scaling_factor, read.transformer["layernorm_epsilon"]]
    assert all(type(number) is float and 0 < number < math.inf for number in numbers)
    counts = [read.max_sequence_length, read.vocab_rows, read.vocab_size]
    counts += [read.transformer[name] for name in ("num_layers", "hidden_size", "num_attention_heads", "kv_channels")]
    assert all(type(count) is int and count > 0 for count in counts) and read.vocab_size <= read.vocab_rows
    assert type(read.transformer["softmax_scale"]) in (float, type(None))
    assert parameter_count(read) > 0
    return "read"
