"""Which keys a configuration may have: those that mean something here, and those of NeMo-Aligner that need not.

A key that nobody reads is refused: a misspelt one would leave its default in force without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from nemo_spin.errors import ConfigError

_DATASET = (
    "file_path prompt_template label_key add_bos add_eos add_sep max_seq_length shuffle overlong truncation_field "
    "truncation_method on_bad_record"
)
_RECOMPUTE = "activations_checkpoint_granularity activations_checkpoint_method activations_checkpoint_num_layers"

# section -> keys that are read, here or by NeMo's exp_manager
KEYS: dict[str, frozenset[str]] = {
    section: frozenset(keys.split())
    for section, keys in {
        "": "trainer exp_manager pretrained_checkpoint model",
        "trainer": "num_nodes devices accelerator precision spin",
        "trainer.spin": (
            "max_iterations max_epochs max_steps val_check_interval save_interval limit_train_batches "
            "limit_val_batches gradient_clip_val log_samples"
        ),
        "exp_manager": (
            "explicit_log_dir exp_dir name create_tensorboard_logger "
            "summary_writer_kwargs create_wandb_logger wandb_logger_kwargs create_mlflow_logger "
            "mlflow_logger_kwargs resume_if_exists max_time_per_run "
            "resume_ignore_no_checkpoint log_local_rank_0_only log_global_rank_0_only files_to_copy "
            "checkpoint_callback_params"
        ),
        "exp_manager.checkpoint_callback_params": "monitor mode save_top_k save_nemo_on_train_end",
        "pretrained_checkpoint": "restore_from_path",
        "model": (
            "tensor_model_parallel_size pipeline_model_parallel_size sequence_parallel micro_batch_size "
            f"global_batch_size encoder_seq_length seed {_RECOMPUTE} spin optim data tokenizer"
        ),
        "model.spin": (
            "ref_policy_kl_penalty rollout_batch_size rollout_window log_prob_forward_micro_batch_size "
            "reset_optimizer_each_iteration held_out_rollouts first_rollouts_from_data sampling_params length_params"
        ),
        "model.spin.sampling_params": (
            "use_greedy temperature top_k top_p repetition_penalty end_strings add_BOS all_probs compute_logprob"
        ),
        "model.spin.length_params": "max_length min_length",
        "model.optim": "name lr weight_decay betas eps sched",
        "model.optim.sched": "name warmup_steps constant_steps min_lr",
        "model.data": "train_ds validation_ds cache_dir chat_prompt_tokens",
        "model.data.chat_prompt_tokens": "system_turn_start turn_start label_start end_of_turn end_of_name",
        "model.data.train_ds": f"{_DATASET} weights",
        "model.data.validation_ds": _DATASET,
        "model.tokenizer": "library type model",
    }.items()
}

# earlier names, and where what they meant is set now
_RENAMED = {
    "model.spin.generation_batch_size": "model.spin.rollout_batch_size",
    "model.spin.rollout_micro_batch_size": "model.spin.rollout_batch_size",
    "model.spin.beta": "model.spin.ref_policy_kl_penalty",
    "model.spin.num_rounds": "trainer.spin.max_iterations",
    "model.spin.num_rollout_samples": "model.spin.rollout_window",
    "exp_manager.resume_from_checkpoint": "exp_manager.resume_if_exists",
}


@dataclass(frozen=True, slots=True)
class Rule:
    """Which values a key may have. allows: (value, configuration) -> whether it may be that one. words: for people."""

    allows: Callable[[Any, Mapping[str, Any]], bool]
    words: str


_any = Rule(lambda value, cfg: True, "any value")


def _one_of(*values: Any) -> Rule:
    words = {"None": "null", "True": "true", "False": "false"}
    return Rule(
        lambda value, cfg: any(value == allowed and type(value) is type(allowed) for allowed in values),
        " or ".join(words.get(str(value), str(value)) for value in values),
    )


def _same_as(*path: str) -> Rule:
    def allows(value: Any, cfg: Mapping[str, Any]) -> bool:
        other: Any = cfg
        for key in path:
            other = other.get(key) if isinstance(other, Mapping) else None
        return value is None or value == other

    return Rule(allows, f"null or the same as {'.'.join(path)}")


# key -> (the values that it may have, what is so in any case)
_IGNORED: dict[str, tuple[Rule, str]] = {
    "precision": (_same_as("trainer", "precision"), "trainer.precision is what counts"),
    "name": (_any, "exp_manager.name is what counts"),
    "trainer.logger": (_one_of(False, None), "loggers come from exp_manager"),
    "trainer.enable_checkpointing": (_one_of(False, None), "trainer.spin.save_interval says when to save"),
    "trainer.use_distributed_sampler": (_one_of(False, None), "the data order does not depend on the layout"),
    "trainer.replace_sampler_ddp": (_one_of(False, None), "the data order does not depend on the layout"),
    "trainer.accumulate_grad_batches": (_one_of(1, None), "model.global_batch_size says how many pairs make a step"),
    "trainer.log_every_n_steps": (_any, "every step is logged"),
    "trainer.benchmark": (_any, "there are no convolutions"),
    "trainer.max_time": (_one_of(None), "exp_manager.max_time_per_run is what counts"),
    "trainer.max_epochs": (_same_as("trainer", "spin", "max_epochs"), "trainer.spin.max_epochs is what counts"),
    "trainer.max_steps": (_same_as("trainer", "spin", "max_steps"), "trainer.spin.max_steps is what counts"),
    "exp_manager.version": (_one_of(None), "exp_dir/name is the directory of the run"),
    "exp_manager.use_datetime_version": (_any, "exp_dir/name is the directory of the run"),
    "exp_manager.resume_from_checkpoint": (_one_of(None), "exp_manager.resume_if_exists resumes from the last one"),
    "exp_manager.create_checkpoint_callback": (_any, "trainer.spin.save_interval says when to save"),
    **{
        f"exp_manager.checkpoint_callback_params.{key}": (_any, "the last checkpoint and each iteration's are kept")
        for key in ("save_last", "filename", "verbose", "model_parallel_size")
    },
    "exp_manager.checkpoint_callback_params.always_save_nemo": (_one_of(False, None), "a .nemo is written at the end"),
    "model.mcore_gpt": (_one_of(True, None), "the model is megatron-core's"),
    "model.megatron_amp_O2": (_any, "in bf16 the main parameters are always fp32"),
    "model.transformer_engine": (_any, "TransformerEngine is used when it is installed"),
    "model.overwrite_base_config": (_any, "the checkpoint's configuration gives the architecture and nothing else"),
    "model.ub_tp_comm_overlap": (_one_of(False, None), "communication is not overlapped by TransformerEngine"),
    "model.ub_tp_comm_overlap_cfg": (_one_of(None), "communication is not overlapped by TransformerEngine"),
    "model.virtual_pipeline_model_parallel_size": (_one_of(None, 1), "each process holds one pipeline stage"),
    "model.context_parallel_size": (_one_of(None, 1), "sequences are not split over processes"),
    "model.expert_model_parallel_size": (_one_of(None, 1), "models with experts are not supported"),
    "model.expert_tensor_parallel_size": (_one_of(None, 1), "models with experts are not supported"),
    "model.pipeline_model_parallel_split_rank": (_one_of(None, 0), "there is no encoder"),
    "model.activations_checkpoint_layers_per_pipeline": (_one_of(None), "all pipeline stages are alike"),
    "model.peft": (
        Rule(lambda value, cfg: not (value or {}).get("peft_scheme"), "null or without peft_scheme"),
        "all parameters are trained",
    ),
    "model.spin.offload_adam_states": (_any, "optimizer states stay on the device, which changes no result"),
    **{
        f"model.optim.{key}": (_any, "a matter of speed that is decided here")
        for key in (
            "bucket_cap_mb overlap_grad_sync overlap_param_sync contiguous_grad_buffer contiguous_param_buffer "
            "grad_sync_dtype"
        ).split()
    },
    "model.data.chat": (_any, "a record's keys say what it is"),
    "model.data.sample": (_one_of(False, None), "every example is used once in an epoch"),
    "model.data.num_workers": (_any, "the data is tokenized once and kept on disk"),
    "model.data.dataloader_type": (_one_of("single", None), "every example is used once in an epoch"),
    "model.data.reset_position_ids": (_one_of(False, None), "examples are not packed"),
    "model.data.reset_attention_mask": (_one_of(False, None), "examples are not packed"),
    "model.data.eod_mask_loss": (_one_of(False, None), "the stop token is part of the response"),
    "model.data.data_impl": (_one_of("jsonl", None), "a file's first bytes say what it is"),
    "model.data.splits_string": (_one_of(None), "train_ds and validation_ds name their files"),
    "model.data.data_prefix": (_one_of(None), "train_ds and validation_ds name their files"),
    "model.data.seq_length": (_same_as("model", "encoder_seq_length"), "model.encoder_seq_length is what counts"),
    "model.data.skip_warmup": (_any, "there is nothing to warm up"),
    "model.data.index_mapping_dir": (_any, "there are no index files"),
    **{
        f"model.data.{dataset}.{key}": rule
        for dataset in ("train_ds", "validation_ds")
        for key, rule in {
            "memmap_workers": (_any, "the data is tokenized once and kept on disk"),
            "hf_dataset": (_any, "the data is tokenized once and kept on disk"),
            "index_mapping_dir": (_any, "there are no index files"),
            "num_workers": (_any, "the data is tokenized once and kept on disk"),
            "min_seq_length": (_one_of(None, 0, 1), "no example is dropped for being short"),
            "drop_last": (_any, "the last batch of an epoch may be smaller, no example is left out"),
            "output_original_text": (_any, "generated responses are kept with their texts"),
            "global_batch_size": (_same_as("model", "global_batch_size"), "model.global_batch_size is what counts"),
            "micro_batch_size": (_same_as("model", "micro_batch_size"), "model.micro_batch_size is what counts"),
            "file_names": (_one_of(None), "file_path names the files"),
            "concat_sampling_probabilities": (_one_of(None), "train_ds.weights says how much of each file is used"),
        }.items()
    },
}


def ignored_keys() -> dict[str, tuple[str, str]]:
    """NeMo-Aligner's keys that are accepted and not read: key -> (values that it may have, what is so in any case)."""
    return {key: (rule.words, reason) for key, (rule, reason) in _IGNORED.items()}


def check_keys(cfg: Mapping[str, Any]) -> None:
    """Refuse unknown keys, and known ones of NeMo-Aligner whose value asks for what is not done here.

    Raises ConfigError.
    """
    for section, known in KEYS.items():
        for key, value in _section(cfg, section).items():
            path = f"{section}.{key}".lstrip(".")
            if key not in known and path not in _IGNORED:
                raise ConfigError(_unknown(section, key))
            if path in _IGNORED and not _IGNORED[path][0].allows(value, cfg):
                raise ConfigError(f"{path} = {value!r} is not supported, {_IGNORED[path][1]}: remove it.")


def check_overrides(argv: Iterable[str]) -> None:
    """Refuse hydra overrides of unknown keys, before hydra does so in its own words.

    Raises ConfigError.
    """
    for argument in argv:
        key, equals, _ = argument.partition("=")
        key = key.lstrip("+~")
        if argument.startswith("-") or not (equals or argument.startswith("~")) or not key:
            continue
        parts = key.split(".")
        # a word without dots may be one of hydra's config groups
        if len(parts) == 1 or "/" in key or "@" in key or parts[0] == "hydra":
            continue
        section = ""
        for part in parts:
            path = f"{section}.{part}".lstrip(".")
            if part not in KEYS[section] and path not in _IGNORED:
                raise ConfigError(_unknown(section, part))
            if path not in KEYS:
                break
            section = path


def _section(cfg: Mapping[str, Any], section: str) -> Mapping[str, Any]:
    node: Any = cfg
    for key in filter(None, section.split(".")):
        node = node.get(key)
        if node is None:
            return {}
        if not isinstance(node, Mapping):
            raise ConfigError(f"{section} = {node!r} must be a mapping of keys to values.")
    return node


def _unknown(section: str, key: str) -> str:
    path = f"{section}.{key}".lstrip(".")
    elsewhere = [f"{other}.{key}".lstrip(".") for other in KEYS if key in KEYS[other]]
    # most unknown keys of `model` name a part of the architecture, which is like none of the known ones
    near = get_close_matches(key, KEYS[section], n=1, cutoff=0.7 if section == "model" else 0.5)
    if path in _RENAMED:
        hint = f"use {_RENAMED[path]}"
    elif elsewhere:
        hint = f"did you mean {elsewhere[0]}?"
    elif near:
        hint = f"did you mean {section}.{near[0]}?".replace(" .", " ")
    elif section == "model":
        hint = "the architecture comes from the checkpoint; known are " + ", ".join(sorted(KEYS[section]))
    else:
        hint = "known are " + ", ".join(sorted(KEYS[section]))
    return f"unknown key {path}: {hint}"
