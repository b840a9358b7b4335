"""Builds the GPT model of an architecture: this process's part of it, in the layout of the process groups.

The only place that names megatron-core's model class and layer specs.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nemo_spin.megatron.layers import CausalAttention, Norm, PackedRows
from nemo_spin.megatron.logprobs import target_logps
from nemo_spin.megatron.packing import ModelInput, Targets
from nemo_spin.megatron.rotary import RotaryAngles
from nemo_spin.runtime.collectives import device

if TYPE_CHECKING:
    from nemo_spin.config import RecomputeConfig
    from nemo_spin.megatron.architecture import Architecture

Precision = Literal["32", "bf16"]
DTYPES = {"32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Labels:
    """What `GPT` is asked for in place of logits. vocab_size: real rows of the vocabulary."""

    targets: Targets
    vocab_size: int


class GPT(GPTModel):
    """megatron-core's model, which can return log-probabilities of response tokens, and take packed tokens.

    Given `Labels`, its last pipeline stage returns fp32 [n], see `target_logps`, and never holds the logits of other
    tokens. Without labels it returns logits as its parent does.
    """

    def _preprocess(self, *args: Any, **kwargs: Any) -> tuple:
        result = super()._preprocess(*args, **kwargs)
        if result[1] is None or not isinstance(kwargs.get("packed_seq_params"), PackedRows):
            return result
        # One rotary angle per position becomes one per token, [T, 1, 1, d].
        return result[0], RotaryAngles.of(result[1].index_select(0, kwargs["position_ids"][0])), *result[2:]

    def _postprocess(self, hidden_states: Tensor, *args: Any, labels: Any = None, **kwargs: Any) -> Tensor:
        if not self.post_process or not isinstance(labels, Labels):
            return super()._postprocess(hidden_states, *args, labels=labels, **kwargs)
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        return target_logps(hidden_states, weight, labels.targets, labels.vocab_size, self.config.sequence_parallel)


def have_transformer_engine() -> bool:
    """Whether TransformerEngine's layers can be used: it is installed, and there is a GPU for it."""
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return HAVE_TE and torch.cuda.is_available()


def forward(model: torch.nn.Module, batch: ModelInput, vocab_size: int) -> Tensor:
    """What a pipeline stage makes of a batch: the last one the log-probabilities [n] of its targets.

    model: `GPT` or its DDP wrapper.
    """
    packed = None
    if batch.rows is not None:
        longest = max(length for _, length in batch.rows.shapes)
        packed = PackedRows(max_seqlen_q=longest, max_seqlen_kv=longest, rows=batch.rows)
    elif batch.lengths is not None:
        packed = _thd(batch.lengths, batch.tokens.device)
    labels = Labels(batch.targets, vocab_size)
    return model(batch.tokens, batch.positions, None, labels=labels, packed_seq_params=packed)


def _thd(lengths: tuple[int, ...], on: torch.device) -> PackedSeqParams:
    """For TransformerEngine's attention, as megatron-core documents it; it was never run here."""
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(on, non_blocking=True)
    longest = max(lengths)
    return PackedSeqParams("thd", ends, ends, max_seqlen_q=longest, max_seqlen_kv=longest)


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
) -> GPT:
    """The layers of this pipeline stage, sharded over this tensor-parallel group, randomly initialized, on `device()`.

    Logits stay sharded over the vocabulary: [b, s, padded_vocab_rows / tensor_model_parallel_size].
    """
    config = transformer_config(architecture, precision, sequence_parallel, recompute)
    model = GPT(
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
    if model.pre_process and architecture.position_embedding_type == "learned_absolute":
        # megatron-core makes them in fp32, whatever params_dtype says.
        model.embedding.position_embeddings.to(config.params_dtype)
    return model.to(device())
