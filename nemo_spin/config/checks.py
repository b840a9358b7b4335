"""What has to fit together in a configuration, after each value for itself: small functions, a group of keys each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from nemo_spin.config.dataset import DatasetConfig
from nemo_spin.config.prompt_template import check_template, check_truncation_field
from nemo_spin.config.schema import SpinConfig
from nemo_spin.errors import ConfigError

_Wrong = Callable[[str, str], ConfigError]  # of a key, and of what to use instead
_Check = Callable[[SpinConfig, _Wrong], Iterator[ConfigError]]

_SPIN = "model.spin"
_SAMPLING = "model.spin.sampling_params"
_CALLBACK = "exp_manager.checkpoint_callback_params"
_EQUILIBRIUM = "trainer.spin.stop_at_equilibrium"
_TRAIN, _VALIDATION = "model.data.train_ds", "model.data.validation_ds"

_CHECKS: list[tuple[frozenset[str], _Check]] = []


def _concerns(keys: str) -> Callable[[_Check], _Check]:
    """Of a check: the keys that it looks at. It is left out where one of them is wrong already."""

    def register(check: _Check) -> _Check:
        _CHECKS.append((frozenset(keys.split()), check))
        return check

    return register


def contradictions(cfg: SpinConfig, wrong: _Wrong, known: Collection[str]) -> Iterator[ConfigError]:
    """What does not fit together. known: the keys that are wrong already."""
    for keys, check in _CHECKS:
        if keys.isdisjoint(known):
            yield from check(cfg, wrong)


@_concerns("trainer.spin.max_steps")
def _steps(cfg: SpinConfig, wrong: _Wrong) -> Iterator[ConfigError]:
    if cfg.loop.max_steps == 0:
        yield wrong("trainer.spin.max_steps", "use -1 for no limit, or at least 1")


@_concerns(
    "trainer.devices trainer.num_nodes model.tensor_model_parallel_size model.pipeline_model_parallel_size "
    "model.global_batch_size model.micro_batch_size"
)
def _layout(cfg: SpinConfig, wrong: _Wrong) -> Iterator[ConfigError]:
    parallel = cfg.parallel
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    per_step = cfg.micro_batch_size * parallel.data_parallel_size
    if parallel.world_size % (tensor * pipeline):
        yield ConfigError(
            f"trainer.devices x trainer.num_nodes = {parallel.world_size} processes cannot be laid out as "
            f"model.tensor_model_parallel_size {tensor} x model.pipeline_model_parallel_size {pipeline}: "
            f"use a multiple of {tensor * pipeline}.",
            "trainer.devices",
        )
    elif cfg.global_batch_size % per_step:
        yield ConfigError(
            f"model.global_batch_size = {cfg.global_batch_size} is not divisible by micro_batch_size "
            f"{cfg.micro_batch_size} x data-parallel size {parallel.data_parallel_size}: use a multiple of {per_step}.",
            "model.global_batch_size",
        )


@_concerns("model.spin.rollout_window model.global_batch_size")
def _window(cfg: SpinConfig, wrong: _Wrong) -> Iterator[ConfigError]:
    if (cfg.spin.rollout_window or 0) % cfg.global_batch_size:
        yield wrong(
            "model.spin.rollout_window", f"use null or a multiple of model.global_batch_size = {cfg.global_batch_size}"
        )


@_concerns(f"{_SAMPLING}.use_greedy {_SAMPLING}.temperature {_SAMPLING}.top_k {_SAMPLING}.top_p")
def _greedy(cfg: SpinConfig, wrong: _Wrong) -> Iterator[ConfigError]:
    sampling = cfg.spin.sampling_params
    if sampling.use_greedy:
        chosen = {"temperature": {*cfg.spin.temperature}, "top_k": {sampling.top_k}, "top_p": {sampling.top_p}}
        for name, off in {"temperature": 1.0, "top_k": 0, "top_p": 1.0}.items():
            if chosen[name] != {off}:
                key = f"{_SAMPLING}.{name}"
                yield wrong(key, f"it contradicts use_greedy: true; set it to {off}, or use_greedy to false")


@_concerns(
    f"{_SPIN}.num_generations {_SPIN}.rejected_selection {_SPIN}.first_rollouts_from_data {_SAMPLING}.use_greedy"
)
def _generations(cfg: SpinConfig, wrong: _Wrong) -> Iterator[ConfigError]:
    number = f"{_SPIN}.num_generations"
    if cfg.spin.num_generations > 1 and cfg.spin.sampling_params.use_greedy:
        yield wrong(number, "greedy decoding makes the same response each time; sample, or set it to 1")
    elif cfg.spin.num_generations > 1 and cfg.spin.first_rollouts_from_data:
        yield wrong(number, "the data bring one response to each prompt: set first_rollouts_from_data to false")
    elif cfg.spin.num_generations == 1 and cfg.spin.rejected_selection != "all":
        key = f"{_SPIN}.rejected_selection"
        yield wrong(key, "with num_generations = 1 there is nothing to choose from; use all")


@_concerns(f"{_SPIN}.replay_iterations {_SPIN}.replay_weights trainer.spin.max_iterations")
def _replay(cfg: SpinConfig, wrong: _Wrong) -> Iterator[ConfigError]:
    number, weights, iterations = cfg.spin.replay_iterations, cfg.spin.replay_weights, cfg.loop.max_iterations
    if number > max(1, iterations - 1):
        yield wrong(
            f"{_SPIN}.replay_iterations",
            f"the last of trainer.spin.max_iterations = {iterations} has {iterations - 1} before it; "
            "use at most so many",
        )
    elif len(weights) != number or not all(weight > 0 for weight in weights):
        yield wrong(
            f"{_SPIN}.replay_weights",
            f"give a number above 0 for each of the replay_iterations = {number}, the last one first",
        )


@_concerns(f"{_SPIN}.length_params.max_length {_SPIN}.length_params.min_length")
def _lengths(cfg: SpinConfig, wrong: _Wrong) -> Iterator[ConfigError]:
    lengths = cfg.spin.length_params
    if 0 < lengths.max_length < lengths.min_length:
        key = f"{_SPIN}.length_params.min_length"
        yield wrong(key, f"it must not be above max_length = {lengths.max_length}")


@_concerns("model.optim.lr model.optim.sched.min_lr")
def _learning_rates(cfg: SpinConfig, wrong: _Wrong) -> Iterator[ConfigError]:
    if cfg.optim.sched.min_lr > (least := min(cfg.optim.lr)):
        yield wrong("model.optim.sched.min_lr", f"it must not be above the learning rate model.optim.lr = {least}")


@_concerns("model.optim.name model.optim.weight_decay")
def _rmsprop(cfg: SpinConfig, wrong: _Wrong) -> Iterator[ConfigError]:
    if cfg.optim.is_rmsprop and cfg.optim.weight_decay:
        key = "model.optim.weight_decay"
        yield wrong(key, "torch's RMSProp would divide it by the gradient's size; set it to 0")


@_concerns(
    f"{_SPIN}.held_out_rollouts {_SPIN}.refresh_reference {_EQUILIBRIUM}.accuracy {_EQUILIBRIUM}.logps_gap "
    f"{_EQUILIBRIUM}.exact_match {_EQUILIBRIUM}.token_overlap"
)
def _equilibrium(cfg: SpinConfig, wrong: _Wrong) -> Iterator[ConfigError]:
    key = _EQUILIBRIUM
    if cfg.loop.stop_at_equilibrium.is_asked_for and not cfg.spin.held_out_rollouts:
        yield ConfigError(f"{key} needs held-out responses: set model.spin.held_out_rollouts above 0.", key)
    elif cfg.loop.stop_at_equilibrium.is_asked_for and not cfg.spin.refresh_reference:
        yield ConfigError(
            f"{key} contradicts model.spin.refresh_reference = false, whose reference does not move towards the data: "
            "set all of its limits to null, or refresh_reference to true.",
            key,
        )


@_concerns(f"{_SPIN}.held_out_rollouts {_VALIDATION}.file_path")
def _held_out(cfg: SpinConfig, wrong: _Wrong) -> Iterator[ConfigError]:
    number = cfg.spin.held_out_rollouts
    if number and cfg.validation_ds is None:
        yield ConfigError(
            f"model.spin.held_out_rollouts = {number}, but model.data.validation_ds.file_path is null: "
            "name the held-out data, or set held_out_rollouts=0.",
            "model.spin.held_out_rollouts",
        )


@_concerns(f"{_CALLBACK}.monitor {_SPIN}.held_out_rollouts")
def _monitor(cfg: SpinConfig, wrong: _Wrong) -> Iterator[ConfigError]:
    if cfg.checkpoint.monitor != "val_loss" and not cfg.spin.held_out_rollouts:
        key = f"{_CALLBACK}.monitor"
        yield wrong(key, "it needs model.spin.held_out_rollouts above 0; use val_loss without")


@_concerns(f"{_CALLBACK}.save_best_model {_CALLBACK}.monitor trainer.spin.limit_val_batches {_VALIDATION}.file_path")
def _best_model(cfg: SpinConfig, wrong: _Wrong) -> Iterator[ConfigError]:
    missing = None
    if cfg.validation_ds is None:
        missing = "model.data.validation_ds.file_path is null: name the validation data"
    elif cfg.checkpoint.monitor == "val_loss" and cfg.loop.limit_val_batches == 0:
        missing = "trainer.spin.limit_val_batches = 0 leaves val_loss out: set it above 0"
    if cfg.checkpoint.save_best_model and missing:
        key = f"{_CALLBACK}.save_best_model"
        yield ConfigError(
            f"{key} needs validation to tell which is best, but {missing}, or set save_best_model to false.", key
        )


@_concerns(f"{_TRAIN}.weights {_TRAIN}.file_path")
def _file_weights(cfg: SpinConfig, wrong: _Wrong) -> Iterator[ConfigError]:
    weights, number = cfg.train_ds.weights, len(cfg.train_ds.file_path)
    if weights is not None and (len(weights) != number or not all(weight > 0 for weight in weights)):
        key = "model.data.train_ds.weights"
        yield wrong(key, f"give a number above 0 for each file of file_path, of which there are {number}")


@_concerns(f"{_TRAIN}.prompt_template {_TRAIN}.label_key {_TRAIN}.overlong {_TRAIN}.truncation_field")
def _training_template(cfg: SpinConfig, wrong: _Wrong) -> Iterator[ConfigError]:
    yield from _template(cfg.train_ds, _TRAIN)


@_concerns(
    f"{_VALIDATION}.prompt_template {_VALIDATION}.label_key {_VALIDATION}.overlong {_VALIDATION}.truncation_field"
)
def _validation_template(cfg: SpinConfig, wrong: _Wrong) -> Iterator[ConfigError]:
    if cfg.validation_ds is not None:
        yield from _template(cfg.validation_ds, _VALIDATION)


def _template(dataset: DatasetConfig, path: str) -> Iterator[ConfigError]:
    wrong = "prompt_template"
    try:
        check_template(dataset.prompt_template, dataset.label_key)
        if dataset.overlong == "truncate":
            wrong = "truncation_field" if dataset.truncation_field else "overlong"
            if dataset.truncation_field is None:
                raise ConfigError("overlong: truncate needs a truncation_field, the field that may be cut.")
            check_truncation_field(dataset.truncation_field, dataset.prompt_template, dataset.label_key)
    except ConfigError as error:
        yield ConfigError(f"{path}: {error}", f"{path}.{wrong}")
