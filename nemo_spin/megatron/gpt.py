"""Builds the GPT model of an architecture: this process's part of it, in the layout of the process groups.

The only place that names megatron-core's model class and layer specs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_spin.megatron.layers import CausalAttention, Norm
from nemo_spin.megatron.setup import device

if TYPE_CHECKING:
    from nemo_spin.checkpoint.architecture import Architecture
    from nemo_spin.config import RecomputeConfig

Precision = Literal["32", "bf16"]
DTYPES = {"32": torch.float32, "bf16": torch.bfloat16}


def have_transformer_engine() -> bool:
    """Whether TransformerEngine's layers can be used: it is installed, and there is a GPU for it."""
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return HAVE_TE and torch.cuda.is_available()


def padded_vocab_rows(vocab_rows: int, tensor_model_parallel_size: int) -> int:
    """Rows of the embedding in memory: those of the checkpoint, rounded up so that every rank holds as many."""
    return -(-vocab_rows // tensor_model_parallel_size) * tensor_model_parallel_size


def transformer_config(
    architecture: Architecture,
    precision: Precision,
    sequence_parallel: bool = False,
    recompute: RecomputeConfig | None = None,
) -> TransformerConfig:
    """megatron-core's configuration of the architecture in this layout and precision.

    Dropout is off: SPIN compares log-probabilities of the policy with those of its reference, and noise in either
    would be learned.
    """
    dtype = DTYPES[precision]
    recompute_options = {}
    if recompute is not None and recompute.granularity is not None:
        recompute_options["recompute_granularity"] = recompute.granularity
        if recompute.granularity == "full":
            recompute_options["recompute_method"] = recompute.method or "uniform"
            recompute_options["recompute_num_layers"] = recompute.num_layers or 1
    return TransformerConfig(
        **architecture.transformer,
        **recompute_options,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        sequence_parallel=sequence_parallel and parallel_state.get_tensor_model_parallel_world_size() > 1,
        variable_seq_lengths=parallel_state.get_pipeline_model_parallel_world_size() > 1,
        # Of no effect without experts, but megatron-core refuses its default beside variable_seq_lengths.
        moe_token_dispatcher_type="alltoall",
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=precision == "bf16",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=not torch.cuda.is_available(),
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
    )


def _layer_spec(config: TransformerConfig) -> ModuleSpec | TransformerBlockSubmodules:
    if have_transformer_engine():
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    layer = get_gpt_layer_local_spec(normalization=config.normalization, qk_layernorm=config.qk_layernorm)
    layer.submodules.input_layernorm = Norm
    layer.submodules.pre_mlp_layernorm = Norm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = CausalAttention
    for name in ("q_layernorm", "k_layernorm"):
        if getattr(attention, name) is not IdentityOp:
            setattr(attention, name, Norm)
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=Norm)


def build_gpt(
    architecture: Architecture,
    precision: Precision,
    sequence_parallel: bool = False,
    recompute: RecomputeConfig | None = None,
) -> GPTModel:
    """The layers of this pipeline stage, sharded over this tensor-parallel group, randomly initialized, on `device()`.

    Logits stay sharded over the vocabulary: [b, s, padded_vocab_rows / tensor_model_parallel_size].
    """
    config = transformer_config(architecture, precision, sequence_parallel, recompute)
    model = GPTModel(
        config,
        _layer_spec(config),
        vocab_size=padded_vocab_rows(architecture.vocab_rows, config.tensor_model_parallel_size),
        max_sequence_length=architecture.max_sequence_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=True,
        share_embeddings_and_output_weights=architecture.share_embeddings_and_output_weights,
        position_embedding_type=architecture.position_embedding_type,
        rotary_percent=architecture.rotary_percent,
        rotary_base=architecture.rotary_base,
        rope_scaling=architecture.rope_scaling,
        rope_scaling_factor=architecture.rope_scaling_factor,
        seq_len_interpolation_factor=architecture.seq_len_interpolation_factor,
    )
    return model.to(device())
