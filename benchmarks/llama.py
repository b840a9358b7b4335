"""A Llama of any shape, as this package describes architectures."""

from __future__ import annotations

import torch.nn.functional as F
from cost_model import Shape

from nemo_spin.megatron.architecture import Architecture, transformer_fields


def llama(shape: Shape, max_sequence_length: int) -> Architecture:
    """max_sequence_length: tokens. The vocabulary is not padded."""
    return Architecture(
        transformer=transformer_fields(
            num_layers=shape.layers,
            hidden_size=shape.hidden,
            num_attention_heads=shape.heads,
            num_query_groups=shape.groups,
            ffn_hidden_size=shape.ffn,
            kv_channels=shape.head_dim,
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
        vocab_rows=shape.vocab,
        vocab_size=shape.vocab,
        max_sequence_length=max_sequence_length,
        position_embedding_type="rope",
    )
