"""Which keys a configuration may have: those that mean something here, and those of NeMo-Aligner that need not.

A key that is neither is refused: a misspelt one would leave its default in force without a word.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from nemo_spin.config.aligner.translate import TRANSLATED
from nemo_spin.config.aligner.unread import UNREAD
from nemo_spin.config.values import in_words, shown
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
            "limit_val_batches gradient_clip_val log_samples max_skipped_steps hang_timeout stop_at_equilibrium"
        ),
        "trainer.spin.stop_at_equilibrium": "accuracy logps_gap exact_match token_overlap",
        "exp_manager": (
            "explicit_log_dir exp_dir name create_tensorboard_logger "
            "summary_writer_kwargs create_wandb_logger wandb_logger_kwargs create_mlflow_logger "
            "mlflow_logger_kwargs resume_if_exists max_time_per_run "
            "resume_ignore_no_checkpoint log_local_rank_0_only log_global_rank_0_only files_to_copy "
            "checkpoint_callback_params"
        ),
        "exp_manager.checkpoint_callback_params": (
            "monitor mode save_top_k async_save save_best_model save_nemo_on_train_end save_nemo2_on_train_end "
            "save_megatron_on_train_end save_hf_on_train_end"
        ),
        "pretrained_checkpoint": "restore_from_path",
        "model": (
            "tensor_model_parallel_size pipeline_model_parallel_size sequence_parallel micro_batch_size "
            "micro_batch_tokens packed_sequence global_batch_size encoder_seq_length seed "
            f"{_RECOMPUTE} spin optim data tokenizer"
        ),
        "model.spin": (
            "ref_policy_kl_penalty rollout_batch_size kv_cache_gib rollout_window log_prob_forward_micro_batch_size "
            "reset_optimizer_each_iteration held_out_rollouts first_rollouts_from_data generation_engine "
            "num_generations rejected_selection replay_iterations replay_weights refresh_reference "
            "loss_type label_smoothing sft_loss_weight preference_average_log_probs "
            "sampling_params length_params guards"
        ),
        "model.spin.guards": "empty repeated cut_off entropy falling_chosen",
        "model.spin.sampling_params": (
            "use_greedy temperature top_k top_p repetition_penalty end_strings add_BOS all_probs compute_logprob"
        ),
        "model.spin.length_params": "max_length min_length",
        "model.optim": "name lr weight_decay betas alpha eps sched",
        "model.optim.sched": "name warmup_steps constant_steps min_lr",
        "model.data": "train_ds validation_ds cache_dir chat_prompt_tokens",
        "model.data.chat_prompt_tokens": "system_turn_start turn_start label_start end_of_turn end_of_name",
        "model.data.train_ds": f"{_DATASET} weights",
        "model.data.validation_ds": _DATASET,
        "model.tokenizer": "library type model",
    }.items()
}

# names that are not taken, because what they meant was not quite what is set there now
_RENAMED = {
    "model.spin.beta": "model.spin.ref_policy_kl_penalty",
    "model.spin.num_rounds": "trainer.spin.max_iterations",
    "model.spin.num_rollout_samples": "model.spin.rollout_window",
}


def is_known(key: str) -> bool:
    """Whether a configuration may have this full key."""
    section, _, name = key.rpartition(".")
    return name in KEYS.get(section, ()) or key in UNREAD or key in TRANSLATED


def problems(cfg: Mapping[str, Any]) -> Iterator[ConfigError]:
    """What is wrong with the keys of a resolved configuration: those that are unknown, and those of NeMo-Aligner whose
    value asks for what is not done here. One that concerns several sections comes several times.
    """
    for section in KEYS:
        try:
            values = _section(cfg, section)
        except ConfigError as error:
            yield error
            continue
        for name, value in values.items():
            key = f"{section}.{name}".lstrip(".")
            if not is_known(key):
                yield unknown(section, name)
            elif key in UNREAD and UNREAD[key].verdict(value, cfg) == "refused":
                yield ConfigError(f"{key} = {in_words(value)} is not supported, {UNREAD[key].reason}: remove it.", key)


def check_keys(cfg: Mapping[str, Any]) -> None:
    """Raise the first of `problems`."""
    for error in problems(cfg):
        raise error


def _section(cfg: Mapping[str, Any], section: str) -> Mapping[str, Any]:
    node: Any = cfg
    path = ""
    for name in filter(None, section.split(".")):
        path = f"{path}.{name}".lstrip(".")
        node = node.get(name)
        if node is None:
            return {}
        if not isinstance(node, Mapping):
            raise ConfigError(f"{path} = {shown(node)} must be a mapping of keys to values.", path)
    return node


def unknown(section: str, key: str) -> ConfigError:
    """The error for a key that a section may not have, with the nearest one that it may."""
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
    return ConfigError(f"unknown key {path}: {hint}", path)
