"""`nemo-spin train`: hydra's arguments, the run's processes, and the training in each of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig


def add_parser(commands: Any) -> None:
    """For `--help` alone: hydra reads this command's arguments."""
    commands.add_parser(
        "train",
        usage="nemo-spin train [--config-path DIR] [--config-name NAME] [KEY=VALUE ...]",
        help="run SPIN on an SFT checkpoint",
        description="Run SPIN on an SFT checkpoint. KEY=VALUE overrides a key of conf/gpt_spin.yaml, as in "
        "trainer.devices=4 model.tensor_model_parallel_size=2; --cfg job prints the configuration.",
    )


def is_asked_for(argv: list[str]) -> bool:
    """Whether a command line is hydra's to read."""
    return argv[:1] == ["train"] and not {"-h", "--help"} & set(argv)


def run(argv: list[str]) -> int:
    """`nemo-spin train` with hydra's arguments. Returns the exit code."""
    return run_hydra(_hydra_main, ["nemo-spin", *argv])


def run_hydra(hydra_main: Callable[[], None], argv: list[str]) -> int:
    """Call a function decorated by NeMo's hydra_runner, after a look at the overrides. Returns the exit code.

    argv: the script's name and hydra's arguments; a relative --config-path is looked up in the working directory first.
    """
    from nemo_spin.cli.launch import guarded
    from nemo_spin.config import addable_overrides, check_overrides, register_resolvers, with_shipped_configurations
    from nemo_spin.config.composing import composing

    def command() -> None:
        check_overrides(argv[1:])
        register_resolvers()
        # otherwise hydra cuts the traceback of an error that is ours to a line, and exits
        os.environ.setdefault("HYDRA_FULL_ERROR", "1")
        arguments = with_shipped_configurations(addable_overrides(_with_absolute_config_path(argv[1:])))
        sys.argv = [argv[0], *arguments]
        with composing("the configuration", until=run_training):
            hydra_main()

    return guarded(command)


def run_training(cfg: DictConfig) -> None:
    """What hydra runs, in every process: check the configuration, start the processes if need be, train.

    Leaves by SystemExit unless all is well: hydra would print a traceback for any other exception.
    """
    from nemo_spin.cli.launch import guarded, run
    from nemo_spin.config import parse_config, with_defaults

    def command() -> int:
        complete = with_defaults(cfg)
        parallel = parse_config(complete).parallel
        from nemo_spin.commands.train import preflight, train

        return run(parallel, partial(train, complete), partial(preflight, complete))

    if code := guarded(command):
        sys.exit(code)


def _hydra_main() -> None:
    from nemo.core.config import hydra_runner

    from nemo_spin.config import config_dir

    hydra_runner(config_path=str(config_dir()), config_name="gpt_spin")(run_training)()


def _with_absolute_config_path(arguments: list[str]) -> list[str]:
    """Hydra looks a relative path up beside the script; here a directory in the working directory comes first."""
    made_absolute = []
    follows = False
    for argument in arguments:
        prefix, path = ("", argument) if follows else ("--config-path=", argument.removeprefix("--config-path="))
        follows = argument in ("--config-path", "-cp")
        if (prefix == "" or path != argument) and Path(path).is_dir():
            argument = prefix + str(Path(path).resolve())
        made_absolute.append(argument)
    return made_absolute
