"""What goes wrong while hydra reads a configuration and its overrides, in one sentence instead of its own words."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from traceback import walk_tb
from typing import Any

import yaml
from omegaconf.errors import OmegaConfBaseException

from nemo_spin.errors import ConfigError, one_line


@contextmanager
def composing(what: str, until: Callable[..., Any] | None = None) -> Iterator[None]:
    """Raise ConfigError for what hydra, OmegaConf and YAML raise of a configuration that cannot be read.

    what: names the configuration in the sentence. until: the function that gets the configuration, where it is called
    in this context too: what it raises is no matter of reading, and stays what it is.
    """
    from hydra.errors import HydraException

    try:
        yield
    # What is not hydra's own it lets through: numbers with too many digits, texts that are not UTF-8, values of a kind
    # that it does not expect, files that may not be read.
    except (
        HydraException, OmegaConfBaseException, yaml.YAMLError, RecursionError,
        ValueError, TypeError, AttributeError, AssertionError, OSError,
    ) as error:  # fmt: skip
        if until is not None and any(frame.f_code is until.__code__ for frame, _ in walk_tb(error.__traceback__)):
            raise
        raise ConfigError(_sentence(what, error)) from error


def _sentence(what: str, error: Exception) -> str:
    reason = one_line(error if str(error) else error.__cause__ or error)
    if isinstance(error, RecursionError):
        return f"{what} is nested too deeply, or refers to itself: flatten it"
    if isinstance(error, yaml.YAMLError):
        return f"{what} is not valid YAML: {reason}"
    if override := getattr(error, "override", None):  # hydra does not always name it
        return f"override {ascii(override)[:300]}: {reason}"
    return f"{what} cannot be read: {reason}"
