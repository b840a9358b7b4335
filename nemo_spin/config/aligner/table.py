"""NeMo-Aligner's keys, and others that people may try: what becomes of each.

A few are taken under another name. Nothing reads the others: a value that asks for what is so in any case is fine; any
other is refused where the result would not be the one that was asked for, and else noted when a run begins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nemo_spin.config.reading import at

_Test = Callable[[Any, Mapping[str, Any]], bool]


@dataclass(frozen=True, slots=True)
class Rule:
    """Which values of a key, given the whole configuration. words: the same for people."""

    holds: _Test
    words: str


@dataclass(frozen=True, slots=True)
class AlignerKey:
    """What becomes of a key.

    agrees: the values, beside null, that ask for what is so in any case. reason: what that is.
    refused: of the other values, those that are refused; what is left is noted.
    target: the key that takes its value. is_taken: False for a name that is refused, because what it meant is not quite
        what `target` does.
    """

    agrees: Rule
    reason: str
    refused: Rule
    target: str | None = None
    is_taken: bool = True

    def verdict(self, value: Any, cfg: Mapping[str, Any]) -> str:
        """ "honoured", "no effect" or "refused"; what has a `target` is honoured there."""
        if value is None or self.agrees.holds(value, cfg):
            return "honoured"
        return "refused" if self.refused.holds(value, cfg) else "no effect"


def _one_of(*values: Any) -> Rule:
    words = {"True": "true", "False": "false"}
    return Rule(
        lambda value, cfg: any(value == allowed and type(value) is type(allowed) for allowed in values),
        " or ".join(words.get(str(value), str(value)) for value in values) or "null",
    )


def _same_as(key: str) -> Rule:
    return Rule(lambda value, cfg: value == at(cfg, key), f"the same as {key}")


_ANY = Rule(lambda value, cfg: True, "any")
_REFUSED = Rule(lambda value, cfg: True, "refused")
_NOTED = Rule(lambda value, cfg: False, "noted")


def _refuse(agrees: Rule, reason: str) -> AlignerKey:
    return AlignerKey(agrees, reason, _REFUSED)


def _note(agrees: Rule, reason: str) -> AlignerKey:
    return AlignerKey(agrees, reason, _NOTED)


def _takes(target: str) -> AlignerKey:
    return AlignerKey(_ANY, f"{target} is the same", _NOTED, target)


def _renamed(target: str) -> AlignerKey:
    return AlignerKey(_ANY, f"use {target}", _NOTED, target, is_taken=False)


def _all_true(value: Any) -> bool:
    return all(map(_all_true, value.values())) if isinstance(value, Mapping) else value is True


def _is_model_parallel_size(value: Any, cfg: Mapping[str, Any]) -> bool:
    sizes = [at(cfg, f"model.{kind}_model_parallel_size") or 1 for kind in ("tensor", "pipeline")]
    return all(isinstance(size, int) for size in sizes) and value == sizes[0] * sizes[1]


_FALSE, _TRUE, _ANY_FLAG, _NULL = _one_of(False), _one_of(True), _one_of(True, False), _one_of()

_ONCE = "the data is tokenized once and kept on disk"
_SMALLER_BATCH = "the last batch of an epoch may be smaller, no example is left out"
_NOT_PACKED = "data is not packed beforehand; model.packed_sequence packs what goes through the model together"
_DATA_ORDER = "the data order does not depend on the layout"
_BUFFERS = "megatron-core lays out the gradients and decides when they are sent"
_NO_OVERLAP = "communication is not overlapped by TransformerEngine"
_NO_EXPERTS = "models with experts are not supported"
_NO_DROPOUT = "there is no dropout"
_FILES = "train_ds and validation_ds name their files in file_path"
_NO_INDEX = "there are no index files; tokenized data is kept in model.data.cache_dir"
_ONE_LOG = "NeMo's log is written by rank 0 alone"
_RUN_DIR = "exp_dir/name is the directory of the run"
_EVERY_EXAMPLE = "every example is used once in an epoch"

TABLE: dict[str, AlignerKey] = {
    "model.spin.rollout_micro_batch_size": _takes("model.spin.rollout_batch_size"),
    "model.spin.generation_batch_size": _takes("model.spin.rollout_batch_size"),
    "trainer.max_time": _takes("exp_manager.max_time_per_run"),
    "model.spin.beta": _renamed("model.spin.ref_policy_kl_penalty"),
    "model.spin.num_rounds": _renamed("trainer.spin.max_iterations"),
    "model.spin.num_rollout_samples": _renamed("model.spin.rollout_window"),
    "precision": _refuse(_same_as("trainer.precision"), "trainer.precision is what counts"),
    "name": _note(_same_as("exp_manager.name"), "exp_manager.name is what counts"),
    "trainer.logger": _refuse(_FALSE, "loggers come from exp_manager"),
    "trainer.enable_checkpointing": _refuse(_FALSE, "trainer.spin.save_interval says when to save"),
    "trainer.use_distributed_sampler": _refuse(_FALSE, _DATA_ORDER),
    "trainer.replace_sampler_ddp": _refuse(_FALSE, _DATA_ORDER),
    "trainer.accumulate_grad_batches": _refuse(_one_of(1), "model.global_batch_size says how many pairs make a step"),
    "trainer.log_every_n_steps": _note(_one_of(1), "every step is logged"),
    "trainer.benchmark": _note(_FALSE, "there are no convolutions to choose kernels for"),
    "trainer.max_epochs": _refuse(_same_as("trainer.spin.max_epochs"), "trainer.spin.max_epochs is what counts"),
    "trainer.max_steps": _refuse(_same_as("trainer.spin.max_steps"), "trainer.spin.max_steps is what counts"),
    "trainer.spin.trt_llm": _note(
        Rule(lambda value, cfg: not at(value, "enable"), "without enable: true"),
        "megatron-core generates the responses, TensorRT-LLM is not used",
    ),
    "exp_manager.version": _refuse(_NULL, _RUN_DIR),
    "exp_manager.use_datetime_version": _note(_FALSE, _RUN_DIR),
    "exp_manager.resume_from_checkpoint": _refuse(_NULL, "exp_manager.resume_if_exists resumes from the last one"),
    "exp_manager.log_local_rank_0_only": _refuse(_ANY_FLAG, _ONE_LOG),
    "exp_manager.log_global_rank_0_only": _refuse(_ANY_FLAG, _ONE_LOG),
    "exp_manager.create_checkpoint_callback": _note(_TRUE, "checkpoints are written in any case"),
    **{
        f"exp_manager.checkpoint_callback_params.{key}": unread
        for key, unread in {
            "save_last": _note(_TRUE, "the newest checkpoint is always kept"),
            "filename": _note(_NULL, "checkpoints are directories named after iteration and step"),
            "verbose": _note(_FALSE, "what is saved is always said in one line"),
            "model_parallel_size": _note(
                Rule(_is_model_parallel_size, "the product of the two sizes"),
                "the layout is that of model.tensor_model_parallel_size and pipeline_model_parallel_size",
            ),
            "always_save_nemo": _refuse(_FALSE, "a .nemo is written once, at the end of the run"),
        }.items()
    },
    "model.mcore_gpt": _refuse(_TRUE, "the model is megatron-core's"),
    "model.megatron_amp_O2": _note(
        Rule(
            lambda value, cfg: value is True or "bf16" not in str(at(cfg, "trainer.precision") or "bf16"),
            "true, or any value in fp32",
        ),
        "in bf16 the main parameters are fp32 in any case",
    ),
    "model.precision": _refuse(_same_as("trainer.precision"), "trainer.precision is what counts"),
    "model.transformer_engine": _note(_TRUE, "TransformerEngine is used when it is installed"),
    "model.overwrite_base_config": _note(
        Rule(lambda value, cfg: _all_true(value), "true for each key that it names"),
        "the checkpoint's configuration gives the architecture and nothing else",
    ),
    "model.max_position_embeddings": _refuse(
        _same_as("model.encoder_seq_length"), "the checkpoint says how many positions there are"
    ),
    **{
        f"model.{key}": _refuse(_one_of(0.0, 0), _NO_DROPOUT)
        for key in ("hidden_dropout", "attention_dropout", "ffn_dropout")
    },
    "model.ub_tp_comm_overlap": _note(_FALSE, _NO_OVERLAP),
    "model.ub_tp_comm_overlap_cfg": _note(_NULL, _NO_OVERLAP),
    "model.virtual_pipeline_model_parallel_size": _refuse(_one_of(1), "each process holds one pipeline stage"),
    "model.context_parallel_size": _refuse(_one_of(1), "sequences are not split over processes"),
    "model.expert_model_parallel_size": _refuse(_one_of(1), _NO_EXPERTS),
    "model.expert_tensor_parallel_size": _refuse(_one_of(1), _NO_EXPERTS),
    "model.pipeline_model_parallel_split_rank": _refuse(_one_of(0), "there is no encoder"),
    "model.activations_checkpoint_layers_per_pipeline": _refuse(_NULL, "all pipeline stages are alike"),
    "model.peft": _refuse(
        Rule(lambda value, cfg: not at(value, "peft_scheme"), "without peft_scheme"),
        "all parameters are trained",
    ),
    **{
        f"model.spin.sampling_params.{key}": _refuse(_FALSE, "a response continues the prompt as the data has it")
        for key in ("add_BOS", "all_probs", "compute_logprob")
    },
    "model.spin.offload_adam_states": _note(_FALSE, "optimizer states stay on the device, which changes no result"),
    "model.optim.bucket_cap_mb": _note(_NULL, _BUFFERS),
    "model.optim.overlap_grad_sync": _note(_FALSE, _BUFFERS),
    "model.optim.overlap_param_sync": _note(_FALSE, _BUFFERS),
    "model.optim.contiguous_grad_buffer": _note(_TRUE, _BUFFERS),
    "model.optim.contiguous_param_buffer": _note(_TRUE, _BUFFERS),
    "model.optim.grad_sync_dtype": _note(_one_of("fp32", "32"), "gradients are summed in fp32"),
    "model.data.chat": _refuse(_ANY_FLAG, "a record's keys say whether it is a chat"),
    "model.data.sample": _refuse(_FALSE, _EVERY_EXAMPLE),
    "model.data.num_workers": _note(_one_of(0), _ONCE),
    "model.data.dataloader_type": _refuse(_one_of("single"), _EVERY_EXAMPLE),
    "model.data.reset_position_ids": _refuse(_FALSE, _NOT_PACKED),
    "model.data.reset_attention_mask": _refuse(_FALSE, _NOT_PACKED),
    "model.data.eod_mask_loss": _refuse(_FALSE, "the stop token is part of the response"),
    "model.data.data_impl": _refuse(_one_of("jsonl", "json"), "a file's first bytes say what it is"),
    "model.data.splits_string": _refuse(_NULL, _FILES),
    "model.data.data_prefix": _refuse(_NULL, _FILES),
    "model.data.seq_length": _refuse(_same_as("model.encoder_seq_length"), "model.encoder_seq_length is what counts"),
    "model.data.skip_warmup": _note(_TRUE, "there is nothing to warm up"),
    "model.data.index_mapping_dir": _note(_NULL, _NO_INDEX),
    **{
        f"model.data.{dataset}.{key}": unread
        for dataset in ("train_ds", "validation_ds")
        for key, unread in {
            "add_sep": _refuse(_FALSE, "nothing is put between prompt and response but what prompt_template has there"),
            "memmap_workers": _note(_one_of(0), _ONCE),
            "num_workers": _note(_one_of(0), _ONCE),
            "hf_dataset": _refuse(_ANY_FLAG, "a file's first bytes say how it is read"),
            "index_mapping_dir": _note(_NULL, _NO_INDEX),
            "min_seq_length": _note(_one_of(0, 1), "no example is left out for being short, nor was it by NeMo"),
            "drop_last": _note(_FALSE, _SMALLER_BATCH),
            "output_original_text": _refuse(_ANY_FLAG, "generated responses are kept with their texts"),
            "pad_to_max_length": _note(_FALSE, "sequences are padded to the longest of their batch"),
            "packed_sequence": _refuse(_FALSE, _NOT_PACKED),
            "packed_sequence_return_cu_seqlen": _note(_ANY_FLAG, _NOT_PACKED),
            "seed": _note(_same_as("model.seed"), "model.seed is what counts"),
            "file_names": _refuse(_NULL, "file_path names the files, one or a list"),
            "concat_sampling_probabilities": _refuse(
                _NULL, "train_ds.weights says how often each file is used in an epoch"
            ),
        }.items()
    },
    "model.data.train_ds.global_batch_size": _refuse(
        _same_as("model.global_batch_size"), "model.global_batch_size is what counts"
    ),
    "model.data.train_ds.micro_batch_size": _refuse(
        _same_as("model.micro_batch_size"), "model.micro_batch_size is what counts"
    ),
    "model.data.validation_ds.global_batch_size": AlignerKey(
        _same_as("model.global_batch_size"),
        "validation has batches of model.global_batch_size",
        Rule(
            lambda value, cfg: type(limit := at(cfg, "trainer.spin.limit_val_batches")) is int and limit > 0,
            "refused if trainer.spin.limit_val_batches is a number of batches, else noted",
        ),
    ),
    "model.data.validation_ds.micro_batch_size": _note(
        _same_as("model.micro_batch_size"), "validation has micro-batches of model.micro_batch_size"
    ),
}
