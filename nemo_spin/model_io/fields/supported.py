"""Which fields of a TransformerConfig change the computation in a way that this project does not reproduce.

NeMo 2 writes the whole configuration, NeMo 1 passes every key that bears a field's name on to megatron-core: one
table serves both. What is not known to be harmless is refused by name, never silently ignored.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import MISSING, fields
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_spin.errors import CheckpointError

# Field -> what it asks for. A falsy value means that it is not asked for.
UNSUPPORTED = {
    "apply_residual_connection_post_layernorm": "residual connections after the norm",
    "attention_output_gate": "gated attention output",
    "activation_func_clamp_value": "clamped activations",
    "attn_logit_softcapping": "soft-capped attention scores",
    "final_logit_softcapping": "soft-capped logits",
    "experimental_attention_variant": "an experimental attention",
    "glu_linear_offset": "an offset in the gated linear unit",
    "heterogeneous_block_specs": "layers that differ from each other",
    "is_hybrid_model": "layers other than attention",
    "linear_attention_freq": "linear attention",
    "mrope_section": "multimodal rotary embeddings",
    "mtp_num_layers": "multi-token prediction",
    "multi_latent_attention": "multi-latent attention",
    "no_rope_freq": "layers without rotary embeddings",
    "num_moe_experts": "a mixture of experts",
    "qk_l2_norm": "L2-normalized queries and keys",
    "quant_recipe": "quantized weights",
    "use_kitchen": "quantized layers",
    "use_mup": "muP scaling",
    "use_transformer_engine_full_layer_spec": "TransformerEngine's fused layer, whose weights have other names",
    "window_attn_skip_freq": "sliding-window attention",
    "window_size": "sliding-window attention",
}

# How a model is trained, laid out and sped up; what initializes it; what belongs to features refused above.
HARMLESS = frozenset(
    """
    account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split activation_func_fp8_input_store
    activation_offload_fraction apply_query_key_layer_scaling apply_rope_fusion attention_backend attention_dropout
    attention_softmax_in_fp32 autocast_dtype barrier_with_L1_time batch_invariant_mode bf16 bias_activation_fusion
    bias_dropout_fusion calculate_per_token_loss clone_scatter_output_in_embedding config_logger_dir cp_comm_type
    cpu_offloading data_step_fn deallocate_pipeline_outputs defer_embedding_wgrad_compute
    delay_offload_until_cuda_graph delay_wgrad_compute delta_offload_bytes_across_pp_ranks deterministic_mode
    disable_bf16_reduced_precision_matmul disable_parameter_transpose_cache distribute_saved_activations
    embedding_init_method embedding_init_method_std enable_autocast ep_overlap_early_attn_memory_release
    experimental_attention_variant_loss_scale_func expert_gtp_weight_remat_size
    expert_tensor_parallel_num_weight_shards external_cuda_graph finalize_model_grads_func first_last_layers_bf16
    flash_attention_version flash_decode forward_step_fn fp16 fp16_lm_cross_entropy fp32_residual_connection
    fused_residual_rmsnorm fused_single_qkv_rope generation_config grad_scale_func grad_sync_func
    gradient_accumulation_fusion gtp_weight_remat_size hetereogenous_dist_checkpoint hidden_dropout
    high_priority_a2a_comm_stream hybrid_context_parallel init_method init_method_std init_model_with_meta_device
    log_max_attention_logit make_vocab_size_divisible_by masked_softmax_fusion max_seqlen_per_dp_cp_rank
    memory_efficient_layer_norm microbatch_group_size_per_vp_stage min_offloaded_tensor_size mlp_chunks_for_prefill
    mlp_chunks_for_training mtp_detach_heads mtp_grad_scale_func mtp_loss_scaling_factor mtp_standalone
    mtp_use_repeated_layer nccl_all_reduce_for_prefill no_sync_func num_layers_at_end_in_bf16
    num_layers_at_start_in_bf16 num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage
    num_microbatches_with_partial_activation_checkpoints offload_modules output_layer_init_method parallel_output
    param_sync_func params_dtype perform_initialization persist_layer_norm pipeline_dtype
    pipeline_model_parallel_comm_backend pipeline_model_parallel_layout scatter_embedding_sequence_parallel
    sequence_parallel symmetric_ar_type tensor_parallel_num_weight_shards test_mode timers tp_only_amax_red
    transformer_impl use_cpu_initialization use_fused_weighted_squared_relu use_inference_optimized_layers
    use_mamba_mem_eff_path use_ring_exchange_p2p use_te_activation_func use_te_rng_tracker
    use_transformer_engine_op_fuser variable_seq_lengths wgrad_deferral_limit
    """.split()
)
_HARMLESS_PREFIXES = (
    "_cpu_offloading",
    "async_",
    "batch_p2p_",
    "cpu_offloading_",
    "cross_entropy_",
    "cuda_graph_",
    "dsa_",
    "enable_cuda_graph",
    "fine_grained_",
    "fp4",
    "fp8",
    "inference_",
    "kitchen_",
    "linear_conv_",
    "linear_key_",
    "linear_num_",
    "linear_value_",
    "mamba_",
    "moe_",
    "mup_",
    "overlap_",
    "qk_clip",
    "recompute_",
    "tp_comm_",
)
_HARMLESS_SUFFIXES = ("_parallel_size", "_parallel_sizes")

# Llama 3.1's scaling of rotary embeddings: the only values with which megatron-core computes it, beside the factor.
LLAMA31_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "old_context_len": 8192}

_DEFAULTS = {field.name: field.default if field.default is not MISSING else None for field in fields(TransformerConfig)}


def is_transformer_field(name: str) -> bool:
    """Whether megatron-core's TransformerConfig has a field of this name."""
    return name in _DEFAULTS


def refuse_unsupported(config: Mapping[str, Any], used: Collection[str], where: str) -> None:
    """Raises CheckpointError, naming the field, if one asks for what this project does not compute.

    config: field -> value. used: fields that the caller turns into the architecture. where: for the message.
    """
    for name, value in config.items():
        if name in used or name in HARMLESS or name.startswith(_HARMLESS_PREFIXES) or name.endswith(_HARMLESS_SUFFIXES):
            continue
        if not value or (name == "softmax_type" and value == "vanilla"):
            continue
        if name in UNSUPPORTED:
            raise CheckpointError(f"{where} says {name}: {value}, and {UNSUPPORTED[name]} is not supported.")
        if name not in _DEFAULTS or _DEFAULTS[name] != value:
            raise CheckpointError(
                f"{where} says {name}: {value}, which is not supported: it may change what the model computes."
            )


def refuse_other_rope_scaling(config: Mapping[str, Any], where: str) -> None:
    """Raises CheckpointError, naming the field, if rotary embeddings are scaled with other numbers than Llama 3.1's.

    config: NeMo's names -> values. where: for the message.
    """
    for name, only in LLAMA31_SCALING.items():
        if config.get(name) is not None and float(config[name]) != only:
            raise CheckpointError(
                f"{where} says {name}: {config[name]}, which is not supported: megatron-core scales rotary embeddings "
                f"with {only:g} only."
            )
