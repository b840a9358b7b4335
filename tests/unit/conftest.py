from __future__ import annotations

from collections.abc import Callable

import pytest
from hydra import compose, initialize_config_dir

from nemo_spin.config import (
    SpinConfig,
    addable_overrides,
    check_overrides,
    config_dir,
    parse_config,
    register_resolvers,
)

# What a command of the documentation may leave to the reader.
GIVEN = {
    "pretrained_checkpoint.restore_from_path": "sft.nemo",
    "model.data.train_ds.file_path": "train.jsonl",
    "model.data.validation_ds.file_path": "validation.jsonl",
}


@pytest.fixture(scope="session")
def configured() -> Callable[[list[str]], SpinConfig]:
    """A function: the configuration that `nemo-spin train` makes of its arguments, or ConfigError, or hydra's error."""

    def configured(arguments: list[str]) -> SpinConfig:
        check_overrides(arguments)
        names, overrides, remaining = ["gpt_spin"], [], iter(arguments)
        for argument in remaining:
            if argument == "--config-name":
                names.append(next(remaining))
            elif argument.startswith("--config-name="):
                names.append(argument.partition("=")[2])
            elif not argument.startswith("-"):
                overrides.append(argument)
        given = {override.partition("=")[0] for override in overrides}
        overrides += [f"{key}={value}" for key, value in GIVEN.items() if key not in given]
        register_resolvers()
        with initialize_config_dir(str(config_dir()), version_base=None):
            return parse_config(compose(names[-1], addable_overrides(overrides)))

    return configured
