"""What `SpinConfig` promises, field by field, written down apart from its declarations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from nemo_spin.config import algorithm, dataset, schema

Test = Callable[[Any], bool]


def _whole(least: int) -> Test:
    return lambda value: type(value) is int and least <= value < 2**63


def _real(test: Test) -> Test:
    return lambda value: type(value) is float and math.isfinite(value) and test(value)


def _none_or(test: Test) -> Test:
    return lambda value: value is None or test(value)


def _tuple(test: Test, at_least: int = 0) -> Test:
    return lambda value: type(value) is tuple and len(value) >= at_least and all(map(test, value))


def _one_of(*names: str) -> Test:
    return lambda value: value in names


def _flag(value: Any) -> bool:
    return type(value) is bool


def _text(value: Any) -> bool:
    return type(value) is str and value != "" and "\0" not in value and not any(map(_is_surrogate, value))


def _is_surrogate(character: str) -> bool:
    return "\ud800" <= character <= "\udfff"


def _count_or_fraction(least: int) -> Test:
    return lambda value: _whole(least)(value) or (type(value) is float and 0 < value <= 1)


def _max_steps(value: Any) -> bool:
    return (type(value) is int and value == -1) or _whole(1)(value)


_above_0, _at_least_0 = _real(lambda value: value > 0), _real(lambda value: value >= 0)

FIELDS: dict[type, dict[str, Test]] = {
    schema.LoopConfig: {
        "max_iterations": _whole(1),
        "max_epochs": _tuple(_whole(1), 1),
        "max_steps": _max_steps,
        "val_check_interval": _count_or_fraction(0),
        "save_interval": _whole(-1),
        "limit_train_batches": _count_or_fraction(1),
        "limit_val_batches": _count_or_fraction(0),
        "gradient_clip_val": _at_least_0,
        "max_seconds": _none_or(_above_0),
        "log_samples": _whole(0),
        "max_skipped_steps": _whole(0),
        "hang_timeout": _at_least_0,
    },
    schema.EquilibriumConfig: {
        "accuracy": _none_or(_real(lambda value: 0.5 <= value <= 1)),
        "logps_gap": _none_or(_above_0),
        **dict.fromkeys(("exact_match", "token_overlap"), _none_or(_real(lambda value: 0 < value <= 1))),
    },
    algorithm.SamplingParams: {
        "use_greedy": _flag,
        "temperature": _above_0,
        "top_k": _whole(0),
        "top_p": _real(lambda value: 0 < value <= 1),
        "repetition_penalty": _above_0,
        "end_strings": _tuple(_text),
    },
    algorithm.GuardsConfig: {
        **dict.fromkeys(("empty", "repeated", "cut_off"), _none_or(_real(lambda value: 0 < value <= 1))),
        **dict.fromkeys(("entropy", "falling_chosen"), _none_or(_above_0)),
    },
    algorithm.LossConfig: {
        "loss_type": _one_of("logistic", "hinge", "exponential", "correlation"),
        "label_smoothing": _real(lambda value: 0 <= value < 0.5),
        "sft_loss_weight": _at_least_0,
    },
    algorithm.LengthParams: {"max_length": _whole(0), "min_length": _whole(0)},
    algorithm.AlgorithmConfig: {
        "ref_policy_kl_penalty": _tuple(_above_0, 1),
        "temperature": _tuple(_above_0, 1),
        "num_generations": _whole(1),
        "rejected_selection": _one_of("all", "best", "worst"),
        "replay_iterations": _whole(0),
        "replay_weights": _tuple(_above_0),
        "rollout_batch_size": _none_or(_whole(1)),
        "kv_cache_gib": _none_or(_above_0),
        "generation_engine": _one_of("auto", "nemo_spin", "megatron"),
        "rollout_window": _none_or(_whole(1)),
        "log_prob_forward_micro_batch_size": _whole(1),
        "reset_optimizer": _flag,
        "held_out_rollouts": _whole(0),
        "first_rollouts_from_data": _flag,
    },
    schema.ParallelConfig: {
        "num_nodes": _whole(1),
        "devices": _whole(1),
        "tensor_model_parallel_size": _whole(1),
        "pipeline_model_parallel_size": _whole(1),
        "sequence_parallel": _flag,
        "accelerator": _one_of("auto", "gpu", "cpu"),
    },
    schema.SchedConfig: {
        "name": _one_of("CosineAnnealing", "LinearAnnealing", "Constant"),
        "warmup_steps": _whole(0),
        "constant_steps": _whole(0),
        "min_lr": _at_least_0,
    },
    schema.OptimConfig: {
        "name": _text,
        "lr": _tuple(_above_0, 1),
        "weight_decay": _at_least_0,
        "betas": lambda value: len(value) == 2 and _tuple(_real(lambda beta: 0 <= beta < 1))(value),
        "alpha": _real(lambda value: 0 <= value < 1),
        "eps": _above_0,
    },
    dataset.DatasetConfig: {
        "file_path": _tuple(_text, 1),
        "prompt_template": _text,
        "label_key": _text,
        "add_bos": _flag,
        "add_eos": _flag,
        "max_seq_length": _none_or(_whole(2)),
        "shuffle": _flag,
        "overlong": _one_of("refuse", "drop", "truncate"),
        "truncation_field": _none_or(_text),
        "truncation_method": _one_of("left", "right"),
        "on_bad_record": _one_of("error", "skip"),
        "weights": _none_or(_tuple(_above_0, 1)),
        "cache_dir": _none_or(_text),
    },
    dataset.ChatPromptTokens: {part.name: _text for part in fields(dataset.ChatPromptTokens)},
    dataset.TokenizerConfig: {
        "library": _none_or(_one_of("huggingface", "sentencepiece", "tiktoken")),
        "type": _none_or(_text),
        "model": _none_or(_text),
    },
    schema.RecomputeConfig: {
        "granularity": _none_or(_one_of("selective", "full")),
        "method": _none_or(_one_of("uniform", "block")),
        "num_layers": _none_or(_whole(1)),
    },
    schema.CheckpointConfig: {
        "monitor": _one_of("val_loss", "val/loss", "val/rewards/margins", "val/rewards/accuracies"),
        "mode": _one_of("min", "max"),
        "save_top_k": _whole(-1),
    },
    schema.ExperimentConfig: {
        **dict.fromkeys(("explicit_log_dir", "exp_dir"), _none_or(_text)),
        "name": _text,
        **dict.fromkeys(
            ("summary_writer_kwargs", "wandb_logger_kwargs", "mlflow_logger_kwargs"),
            _none_or(lambda value: isinstance(value, Mapping)),
        ),
        "files_to_copy": _tuple(_text),
    },
    schema.SpinConfig: {
        "micro_batch_size": _whole(1),
        "micro_batch_tokens": _none_or(_whole(1)),
        "packed_sequence": _none_or(_flag),
        "global_batch_size": _whole(1),
        "encoder_seq_length": _none_or(_whole(2)),
        "seed": _whole(0),
        "precision": _one_of("32", "bf16"),
        "restore_from_path": _text,
    },
}


FIELDS[dataset.ValidationConfig] = FIELDS[dataset.DatasetConfig]


def broken_promises(config: schema.SpinConfig) -> list[str]:
    """What of a configuration is not as documented: "LoopConfig.max_epochs = 0", or a sentence on two fields."""
    return [*_fields(config), *_together(config)]


def _fields(config: Any) -> list[str]:
    found = []
    tests = FIELDS[type(config)]
    for part in fields(config):
        value = getattr(config, part.name)
        if is_dataclass(value):
            found += _fields(value)
        elif part.name not in tests:
            # switches, and sections that need not be there
            if not (_flag(value) or value is None):
                found.append(f"{type(config).__name__}.{part.name} is in no table")
        elif not tests[part.name](value):
            found.append(f"{type(config).__name__}.{part.name} = {value!r}")
    return found


def _together(config: schema.SpinConfig) -> list[str]:
    loop, spin, parallel, optim = config.loop, config.spin, config.parallel, config.optim
    model_parallel = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    rules = {
        "betas for each iteration": len(spin.ref_policy_kl_penalty) == loop.max_iterations,
        "temperatures for each iteration": len(spin.temperature) == loop.max_iterations,
        "epochs for each iteration": len(loop.max_epochs) == loop.max_iterations,
        "iterations to replay": len(spin.replay_weights) == spin.replay_iterations <= max(1, loop.max_iterations - 1),
        "responses that differ": spin.num_generations == 1
        or not (spin.sampling_params.use_greedy or spin.first_rollouts_from_data),
        "responses to choose from": spin.num_generations > 1 or spin.rejected_selection == "all",
        "an equilibrium that can be measured": not loop.stop_at_equilibrium.is_asked_for
        or (spin.held_out_rollouts > 0 and spin.refresh_reference),
        "RMSProp without decay": optim.name != "rmsprop" or optim.weight_decay == 0,
        "learning rates for each iteration": len(optim.lr) == loop.max_iterations,
        "min_lr is below": optim.sched.min_lr <= min(optim.lr),
        "processes and layout": parallel.num_nodes * parallel.devices % model_parallel == 0,
        "batches and processes": config.global_batch_size
        % (config.micro_batch_size * (parallel.num_nodes * parallel.devices // model_parallel))
        == 0,
        "windows of whole batches": (spin.rollout_window or 0) % config.global_batch_size == 0,
        "no sequence parallelism alone": parallel.tensor_model_parallel_size > 1 or not parallel.sequence_parallel,
        "greedy is greedy": not spin.sampling_params.use_greedy
        or (max(spin.temperature), spin.sampling_params.top_k, spin.sampling_params.top_p) == (1, 0, 1),
        "lengths": not 0 < spin.length_params.max_length < spin.length_params.min_length,
        "held-out data": not spin.held_out_rollouts or config.validation_ds is not None,
        "a metric that there is": config.checkpoint.monitor == "val_loss" or spin.held_out_rollouts > 0,
        "a best model that can be told": not config.checkpoint.save_best_model
        or (config.validation_ds and (config.checkpoint.monitor != "val_loss" or loop.limit_val_batches > 0)),
        "a tokenizer": config.tokenizer is None
        or any((config.tokenizer.library, config.tokenizer.type, config.tokenizer.model)),
        "recomputed layers": (config.recompute.granularity == "full") == (config.recompute.method is not None)
        and (config.recompute.method is None) == (config.recompute.num_layers is None),
    }
    for data in filter(None, (config.train_ds, config.validation_ds)):
        rules |= {
            "weights of files": data.weights is None or len(data.weights) == len(data.file_path),
            "a field to cut": data.overlong != "truncate" or data.truncation_field is not None,
            "the label at the end": data.prompt_template.endswith(f"{{{data.label_key}}}"),
        }
    return [rule for rule, holds in rules.items() if not holds]
