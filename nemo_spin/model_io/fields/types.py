"""The types of the fields that describe a GPT: a text instead of a number or a flag would be taken for something."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from nemo_spin.errors import CheckpointError

_COUNTS = """
    num_layers hidden_size num_attention_heads seq_length encoder_seq_length max_position_embeddings old_context_len
    """.split()
# 0 stands for none
_COUNTS_OR_0 = "num_query_groups ffn_hidden_size kv_channels vocab_size".split()
_NUMBERS = """
    layernorm_epsilon rotary_percent rotary_percentage rotary_base rope_scaling_factor scale_factor low_freq_factor
    high_freq_factor
    """.split()
_NUMBERS_OR_0 = "seq_len_interpolation_factor softmax_scale".split()
_FLAGS = """
    gated_linear_unit add_bias_linear add_qkv_bias qk_layernorm rotary_interleaved layernorm_zero_centered_gamma
    share_embeddings_and_output_weights bias qkv_bias openai_gelu bias_activation_fusion scale_positional_embedding
    use_te_activation_func
    """.split()
_TEXTS = ["position_embedding_type", "normalization", "activation"]


_LARGEST_COUNT = 2**31 - 1


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST_COUNT


def _is_number(value: Any) -> bool:
    """Not below 0. YAML writers and readers do not agree on 1e-05: it may come as a text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return False
    try:
        return 0 <= float(value) < math.inf
    except (ValueError, OverflowError):
        return False


# field -> what it has to be, in words, and whether a value is that
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(
        _COUNTS, (f"a whole number from 1 to {_LARGEST_COUNT}", lambda value: _is_count(value) and value > 0)
    ),
    **dict.fromkeys(_COUNTS_OR_0, (f"a whole number from 0 to {_LARGEST_COUNT}", _is_count)),
    **dict.fromkeys(_NUMBERS, ("a number above 0", lambda value: _is_number(value) and float(value) > 0)),
    **dict.fromkeys(_NUMBERS_OR_0, ("a number of at least 0", _is_number)),
    **dict.fromkeys(_FLAGS, ("true or false", lambda value: isinstance(value, bool))),
    **dict.fromkeys(_TEXTS, ("a text", lambda value: isinstance(value, str))),
}


def check_field_types(config: Mapping[str, Any], where: str) -> None:
    """Raise CheckpointError for a field of another type than NeMo, Megatron and Megatron-Bridge give it; null is none.

    config: field -> value. where: names the configuration in the sentence.
    """
    for name, value in config.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{where} has the key {ascii(name)[:80]}, which names no field.")
        what, holds = _KINDS.get(name, ("", None))
        if holds is not None and value is not None and not holds(value):
            raise CheckpointError(f"{where} says {name}: {ascii(value)[:80]}, which is not {what}.")
