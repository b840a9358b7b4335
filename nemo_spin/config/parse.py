"""From hydra's configuration to `SpinConfig`: defaults and interpolations, then the check of every value."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import cache, partial
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_spin.config.aligner.translate import put, translate, translations
from nemo_spin.config.checks import contradictions
from nemo_spin.config.keys import KEYS, problems
from nemo_spin.config.plain import check_plain
from nemo_spin.config.reading import Reader, at
from nemo_spin.config.schema import MONITORS, RecomputeConfig, SpinConfig
from nemo_spin.config.settings import Section, all_parts
from nemo_spin.config.values import is_number, shown
from nemo_spin.errors import ConfigError, one_line

_SIZES = ("model.tensor_model_parallel_size", "model.pipeline_model_parallel_size")


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
    config, errors = judged(resolved(cfg))
    for error in errors:
        raise error
    return config


def judged(cfg: Mapping[str, Any]) -> tuple[SpinConfig, list[ConfigError]]:
    """A resolved configuration, and everything for which it is refused; with errors the first part is of no use."""
    errors = list(problems(cfg))
    known = _without(cfg, errors)
    sources = {found.target: found.key for found in translations(known)}
    reader = Reader(translate(known))
    config = _completed(reader.read(SpinConfig), reader)
    wrong = {error.key or "" for error in reader.errors}
    for error in [*reader.errors, *contradictions(config, reader.error, wrong)]:
        errors.append(_at_source(error, sources.get(error.key or "")))
    return config, errors


def _at_source(error: ConfigError, source: str | None) -> ConfigError:
    """The error, with the key from which the wrong value was taken, if that is another."""
    return error if source is None else type(error)(str(error).replace(error.key, source), source)


def _without(cfg: Mapping[str, Any], errors: Iterable[ConfigError]) -> dict[str, Any]:
    """A copy without the keys of some errors."""
    rest = deepcopy(dict(cfg))
    for error in errors:
        section, _, name = (error.key or "").rpartition(".")
        if isinstance(node := at(rest, section) if section else rest, dict):
            node.pop(name, None)
    return rest


def _completed(config: SpinConfig, reader: Reader) -> SpinConfig:
    """The configuration with what one key says of another."""
    spin, parallel, recompute, checkpoint = config.spin, config.parallel, config.recompute, config.checkpoint
    if not reader.is_set("model.spin.replay_weights"):
        # More than there are iterations is refused, and may be more than memory holds.
        spin = replace(spin, replay_weights=(1.0,) * min(spin.replay_iterations, config.loop.max_iterations))
    if not reader.is_set("exp_manager.checkpoint_callback_params.mode"):
        checkpoint = replace(checkpoint, mode=MONITORS[checkpoint.monitor])
    if recompute.granularity == "full":
        recompute = RecomputeConfig("full", recompute.method or "uniform", recompute.num_layers or 1)
    else:
        recompute = RecomputeConfig(recompute.granularity)
    return replace(
        config,
        spin=replace(spin, temperature=reader.each["model.spin.sampling_params.temperature"]),
        parallel=replace(
            parallel, sequence_parallel=parallel.sequence_parallel and parallel.tensor_model_parallel_size > 1
        ),
        recompute=recompute,
        checkpoint=checkpoint,
    )


@cache
def defaults() -> dict[str, Any]:
    """The declared defaults, nested as in the YAML; not to be changed."""
    tree: dict[str, Any] = {}
    for part, reference in all_parts(SpinConfig):
        if not isinstance(part.declared, Section):
            put(tree, part.key, f"${{{reference}}}" if reference else part.declared.yaml_default)
    return tree


def with_defaults(cfg: Mapping[str, Any]) -> DictConfig:
    """A configuration with the declared default of every key that it lacks. Raises ConfigError.

    A parallel size that is absent is null, and so the checkpoint's, as in NeMo-Aligner, whose files lack both.
    """
    if not isinstance(cfg, DictConfig):
        if not isinstance(cfg, Mapping):
            raise ConfigError(f"the configuration is {shown(cfg)}: it must be a mapping of keys to values.")
        check_plain(cfg)
    with _as_config_error():
        given = OmegaConf.to_container(OmegaConf.create(cfg), resolve=False)
        complete = _over(deepcopy(defaults()), given, "")
        for size in _SIZES:
            if at(given, size) is None and isinstance(complete["model"], Mapping):
                put(complete, size, None)
        return OmegaConf.create(complete)


def _over(declared: Any, given: Any, section: str) -> Any:
    """What is given over what is declared; a section that is null is as one that is absent."""
    if section not in KEYS or (given is not None and not isinstance(given, Mapping)):
        return given
    merged = dict(declared)
    for name, value in (given or {}).items():
        merged[name] = _over(declared.get(name), value, f"{section}.{name}".lstrip("."))
    return merged


def resolved(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with its defaults as plain mappings, and with what its interpolations come to; see `plain`.

    Raises ConfigError.
    """
    register_resolvers()
    complete = with_defaults(cfg)
    with _as_config_error():
        plain = OmegaConf.to_container(complete, resolve=True)
    check_plain(plain)
    return plain


def with_checkpoint(
    cfg: DictConfig, context_length: int, trained_layout: tuple[int, int] | None
) -> tuple[SpinConfig, DictConfig]:
    """The configuration of a run, complete with what it leaves to the checkpoint: checked, and as it is written down.

    What refers to the length or the sizes has a value only now, so all of it is resolved again. cfg is not changed.

    Args:
        context_length: most tokens of prompt and response together.
        trained_layout: tensor- and pipeline-parallel size of the checkpoint, None where it does not say.
    """
    complete = with_defaults(cfg)
    complete.model.encoder_seq_length = context_length
    for key, size in zip(_SIZES, trained_layout or (1, 1), strict=True):
        if OmegaConf.select(complete, key) is None:
            OmegaConf.update(complete, key, size)
    return parse_config(complete), complete


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
