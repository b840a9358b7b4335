"""From hydra's configuration to `SpinConfig`: types, ranges, and what has to fit together."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_spin.config.aligner.translate import translate
from nemo_spin.config.keys import check_keys
from nemo_spin.config.parse_algorithm import parse_algorithm
from nemo_spin.config.parse_data import parse_dataset, parse_tokenizer, parse_validation
from nemo_spin.config.parse_optim import parse_optim
from nemo_spin.config.plain import check_plain
from nemo_spin.config.schema import (
    MAX_ITERATIONS,
    AlgorithmConfig,
    CheckpointConfig,
    EquilibriumConfig,
    LoopConfig,
    ParallelConfig,
    RecomputeConfig,
    SpinConfig,
)
from nemo_spin.config.values import Section, is_number, shown
from nemo_spin.errors import ConfigError, one_line

_PRECISIONS = {
    **dict.fromkeys(("32", "32-true", "fp32"), "32"),
    **dict.fromkeys(("bf16", "bf16-mixed"), "bf16"),
}
# metric of a validation -> what is best
_MONITORS = {"val_loss": "min", "val/loss": "min", "val/rewards/margins": "max", "val/rewards/accuracies": "max"}
# the loggers of exp_manager that are offered, each with a switch create_*_logger
LOGGERS = ("tensorboard", "wandb", "mlflow")


def register_resolvers() -> None:
    """Make `${int_div:a, b}` and `${multiply:a, b}` known to OmegaConf; of null both make null."""
    for name, function in {"int_div": operator.floordiv, "multiply": operator.mul}.items():
        OmegaConf.register_new_resolver(name, partial(_of_numbers, name, function), replace=True)


def _of_numbers(name: str, function: Callable[[int, int], int], a: Any, b: Any) -> int | None:
    if a is None or b is None:
        return None
    if not is_number(a) or not is_number(b):  # Python would multiply a text
        raise ValueError(f"{name} needs two numbers, found {shown(a)} and {shown(b)}")
    return function(a, b)


def parse_config(cfg: Mapping[str, Any]) -> SpinConfig:
    """Check a configuration laid out like conf/gpt_spin.yaml and make it a `SpinConfig`.

    cfg: hydra's DictConfig, or plain mappings; interpolations are resolved. Reads no file and needs no process group.
    Raises ConfigError that names the key and says what to change.
    """
    cfg = resolved(cfg)
    check_keys(cfg)
    return parse_known(translate(cfg))


def parse_known(cfg: Mapping[str, Any]) -> SpinConfig:
    """`parse_config` for a resolved configuration whose keys are checked and translated."""
    root = Section(cfg)
    trainer, model = root.section("trainer"), root.section("model")
    loop = _loop(trainer.section("spin"), root.section("exp_manager"))
    parallel = _parallel(trainer, model)
    micro_batch_size = model.integer("micro_batch_size", 1, minimum=1)
    global_batch_size = model.integer("global_batch_size", minimum=1)
    per_step = micro_batch_size * parallel.data_parallel_size
    if global_batch_size % per_step:
        raise ConfigError(
            f"model.global_batch_size = {global_batch_size} is not divisible by micro_batch_size {micro_batch_size} x "
            f"data-parallel size {parallel.data_parallel_size}: use a multiple of {per_step}.",
            "model.global_batch_size",
        )
    experiment = root.section("exp_manager")
    _check_experiment(experiment)
    data = model.section("data")
    spin = parse_algorithm(model.section("spin"), loop.max_iterations, global_batch_size)
    _check_equilibrium(loop.stop_at_equilibrium, spin)
    checkpoint = _checkpoint(experiment.section("checkpoint_callback_params"), spin.held_out_rollouts > 0)
    _check_best_model(checkpoint, loop, data.section("validation_ds"))
    if spin.held_out_rollouts and data.section("validation_ds").get("file_path") is None:
        raise ConfigError(
            f"model.spin.held_out_rollouts = {spin.held_out_rollouts}, but model.data.validation_ds.file_path is null: "
            "name the held-out data, or set held_out_rollouts=0.",
            "model.spin.held_out_rollouts",
        )
    return SpinConfig(
        loop=loop,
        spin=spin,
        parallel=parallel,
        optim=parse_optim(model.section("optim"), loop.max_iterations),
        train_ds=parse_dataset(data.section("train_ds"), data, shuffle=True),
        validation_ds=parse_validation(data),
        micro_batch_size=micro_batch_size,
        micro_batch_tokens=model.optional_integer("micro_batch_tokens", minimum=1),
        packed_sequence=model.optional_flag("packed_sequence"),
        global_batch_size=global_batch_size,
        encoder_seq_length=model.optional_integer("encoder_seq_length", minimum=2),
        seed=model.integer("seed", 1234, minimum=0),
        precision=_precision(trainer),
        restore_from_path=root.section("pretrained_checkpoint").path("restore_from_path"),
        tokenizer=parse_tokenizer(model.section("tokenizer")),
        recompute=_recompute(model),
        checkpoint=checkpoint,
    )


def _check_equilibrium(limits: EquilibriumConfig, spin: AlgorithmConfig) -> None:
    if not limits.is_asked_for:
        return
    key = "trainer.spin.stop_at_equilibrium"
    if not spin.held_out_rollouts:
        raise ConfigError(f"{key} needs held-out responses: set model.spin.held_out_rollouts above 0.", key)
    if not spin.refresh_reference:
        raise ConfigError(
            f"{key} contradicts model.spin.refresh_reference = false, whose reference does not move towards the data: "
            "set all of its limits to null, or refresh_reference to true.",
            key,
        )


def _check_best_model(checkpoint: CheckpointConfig, loop: LoopConfig, validation_ds: Section) -> None:
    missing = None
    if validation_ds.get("file_path") is None:
        missing = "model.data.validation_ds.file_path is null: name the validation data"
    elif checkpoint.monitor == "val_loss" and loop.limit_val_batches == 0:
        missing = "trainer.spin.limit_val_batches = 0 leaves val_loss out: set it above 0"
    if checkpoint.save_best_model and missing:
        key = "exp_manager.checkpoint_callback_params.save_best_model"
        raise ConfigError(
            f"{key} needs validation to tell which is best, but {missing}, or set save_best_model to false.", key
        )


def with_defaults(cfg: Mapping[str, Any]) -> DictConfig:
    """The configuration with the keys that NeMo-Aligner's refer to without having them. Raises ConfigError."""
    absent = ("encoder_seq_length", "tensor_model_parallel_size", "pipeline_model_parallel_size")
    if not isinstance(cfg, DictConfig):
        if not isinstance(cfg, Mapping):
            raise ConfigError(f"the configuration is {shown(cfg)}: it must be a mapping of keys to values.")
        check_plain(cfg)
    with _as_config_error():
        given = OmegaConf.create(cfg)
        if isinstance(given.get("model"), ListConfig):
            raise ConfigError(f"model = {shown(list(given.model))} must be a mapping of keys to values.", "model")
        return OmegaConf.merge({"model": dict.fromkeys(absent)}, given)


def resolved(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as plain mappings, with what its interpolations come to; see `plain`. Raises ConfigError."""
    register_resolvers()
    complete = with_defaults(cfg)
    with _as_config_error():
        plain = OmegaConf.to_container(complete, resolve=True)
    check_plain(plain)
    return plain


@contextmanager
def _as_config_error() -> Iterator[None]:
    """What OmegaConf raises, as a ConfigError."""
    try:
        yield
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "the configuration"
        reason = next(iter(str(error).splitlines()), "")  # the rest names key and value again
        raise ConfigError(f"{key} cannot be resolved: {one_line(Exception(reason))}", key) from error
    except RecursionError:
        raise ConfigError("the configuration is nested too deeply, or refers to itself: flatten it.") from None


def _check_experiment(section: Section) -> None:
    """Types of what is handed on to NeMo's exp_manager."""
    for key in ("explicit_log_dir", "exp_dir", "name"):
        section.text(key, None)
    for key in ("summary_writer_kwargs", "wandb_logger_kwargs", "mlflow_logger_kwargs"):
        section.mapping(key)
    for key in ("log_local_rank_0_only", "log_global_rank_0_only"):
        section.flag(key, False)
    section.strings("files_to_copy")
    for name in LOGGERS:
        section.flag(f"create_{name}_logger", False)
    for key in ("resume_if_exists", "resume_ignore_no_checkpoint"):
        section.flag(key, False)


def _checkpoint(section: Section, has_held_out_rollouts: bool) -> CheckpointConfig:
    monitor = section.choice("monitor", tuple(_MONITORS), "val_loss")
    if monitor != "val_loss" and not has_held_out_rollouts:
        raise section.error("monitor", "it needs model.spin.held_out_rollouts above 0; use val_loss without")
    return CheckpointConfig(
        monitor=monitor,
        mode=section.choice("mode", ("min", "max"), _MONITORS[monitor]),
        save_top_k=section.integer("save_top_k", 0, minimum=-1),
        async_save=section.flag("async_save", True),
        save_best_model=section.flag("save_best_model", False),
        save_nemo_on_train_end=section.flag("save_nemo_on_train_end", True),
        save_nemo2_on_train_end=section.flag("save_nemo2_on_train_end", False),
        save_megatron_on_train_end=section.flag("save_megatron_on_train_end", False),
        save_hf_on_train_end=section.flag("save_hf_on_train_end", False),
    )


def _seconds(section: Section, key: str) -> float | None:
    """NeMo's DD:HH:MM:SS in seconds."""
    value = section.get(key)
    if value is None:
        return None
    parts = str(value).split(":")
    if len(parts) != 4 or not all(re.fullmatch(r"[0-9]{1,9}", part) for part in parts) or not any(map(int, parts)):
        raise section.error(key, 'use DD:HH:MM:SS in quotes, such as "00:03:45:00" for 3 hours and 45 minutes')
    days, hours, minutes, seconds = map(int, parts)
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def _loop(spin: Section, experiment: Section) -> LoopConfig:
    max_steps = spin.integer("max_steps", -1, minimum=-1)
    if max_steps == 0:
        raise spin.error("max_steps", "use -1 for no limit, or at least 1")
    max_iterations = spin.integer("max_iterations", 3, minimum=1, maximum=MAX_ITERATIONS)
    return LoopConfig(
        max_iterations=max_iterations,
        max_epochs=spin.whole_per_iteration("max_epochs", 1, max_iterations),
        max_steps=max_steps,
        val_check_interval=spin.count_or_fraction("val_check_interval", 0, of="steps"),
        save_interval=spin.integer("save_interval", 0, minimum=-1),
        limit_train_batches=spin.count_or_fraction("limit_train_batches", 1.0, of="batches", minimum=1),
        limit_val_batches=spin.count_or_fraction("limit_val_batches", 1.0, of="batches"),
        gradient_clip_val=spin.number("gradient_clip_val", 0.0, minimum=0.0),
        max_seconds=_seconds(experiment, "max_time_per_run"),
        log_samples=spin.integer("log_samples", 3, minimum=0),
        max_skipped_steps=spin.integer("max_skipped_steps", 3, minimum=0),
        hang_timeout=spin.number("hang_timeout", 1800.0, minimum=0.0),
        stop_at_equilibrium=_equilibrium(spin.section("stop_at_equilibrium")),
    )


def _equilibrium(section: Section) -> EquilibriumConfig:
    return EquilibriumConfig(
        accuracy=section.optional_number("accuracy", minimum=0.5, maximum=1.0),
        logps_gap=section.optional_number("logps_gap", above=0.0),
        exact_match=section.optional_number("exact_match", above=0.0, maximum=1.0),
        token_overlap=section.optional_number("token_overlap", above=0.0, maximum=1.0),
    )


def _parallel(trainer: Section, model: Section) -> ParallelConfig:
    tensor = model.integer("tensor_model_parallel_size", 1, minimum=1)
    parallel = ParallelConfig(
        num_nodes=trainer.integer("num_nodes", 1, minimum=1),
        devices=trainer.integer("devices", 1, minimum=1),
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=model.integer("pipeline_model_parallel_size", 1, minimum=1),
        sequence_parallel=model.flag("sequence_parallel", False) and tensor > 1,
        accelerator=trainer.choice("accelerator", ("auto", "gpu", "cpu"), "auto"),
    )
    model_parallel = tensor * parallel.pipeline_model_parallel_size
    if parallel.world_size % model_parallel:
        raise ConfigError(
            f"trainer.devices x trainer.num_nodes = {parallel.world_size} processes cannot be laid out as "
            f"model.tensor_model_parallel_size {tensor} x model.pipeline_model_parallel_size "
            f"{parallel.pipeline_model_parallel_size}: use a multiple of {model_parallel}.",
            "trainer.devices",
        )
    return parallel


def _precision(trainer: Section) -> str:
    value = trainer.get("precision", "bf16")
    if isinstance(value, bool) or str(value) not in _PRECISIONS:
        raise trainer.error("precision", "use bf16, bf16-mixed, 32, 32-true or fp32")
    return _PRECISIONS[str(value)]


def _recompute(model: Section) -> RecomputeConfig:
    granularity = model.choice("activations_checkpoint_granularity", ("selective", "full"), None)
    method = model.choice("activations_checkpoint_method", ("uniform", "block"), None)
    num_layers = model.optional_integer("activations_checkpoint_num_layers", minimum=1)
    if granularity != "full":
        return RecomputeConfig(granularity, None, None)
    return RecomputeConfig(granularity, method or "uniform", num_layers or 1)
