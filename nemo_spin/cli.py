"""The command line: `nemo-spin train` and `nemo-spin score`. What is slow to import is imported when it is needed."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import nemo_spin.quiet  # noqa: F401

if TYPE_CHECKING:
    from omegaconf import DictConfig

_TRAIN_USAGE = "nemo-spin train [--config-path DIR] [--config-name NAME] [KEY=VALUE ...]"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for what the user has to put right, 130 after Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["train"] and not {"-h", "--help"} & set(argv):
        # everything that follows is hydra's
        return run_hydra(_hydra_main, ["nemo-spin", *argv[1:]])
    options = _parser().parse_args(argv)
    from nemo_spin.launch import guarded

    return guarded(partial(_score, options))


def run_hydra(hydra_main: Callable[[], None], argv: list[str]) -> int:
    """Call a function decorated by NeMo's hydra_runner, after a look at the overrides. Returns the exit code.

    argv: the script's name and hydra's arguments; a relative --config-path is looked up in the working directory first.
    """
    from hydra.errors import HydraException

    from nemo_spin.config import check_overrides, register_resolvers
    from nemo_spin.errors import ConfigError
    from nemo_spin.launch import guarded

    def command() -> None:
        check_overrides(argv[1:])
        register_resolvers()
        # otherwise hydra cuts the traceback of an error that is ours to a line, and exits
        os.environ.setdefault("HYDRA_FULL_ERROR", "1")
        sys.argv = _with_absolute_config_path(argv)
        try:
            hydra_main()
        except HydraException as error:
            override = getattr(error, "override", None)  # hydra does not always name it
            raise ConfigError(f"override {override!r}: {error}" if override else str(error)) from error

    return guarded(command)


def run_training(cfg: DictConfig) -> None:
    """What hydra runs, in every process: check the configuration, start the processes if need be, train.

    Leaves by SystemExit unless all is well: hydra would print a traceback for any other exception.
    """
    from nemo_spin.config import parse_config, with_defaults
    from nemo_spin.launch import guarded, run

    def command() -> int:
        complete = with_defaults(cfg)
        parallel = parse_config(complete).parallel
        from nemo_spin.run import preflight, train

        return run(parallel, partial(train, complete), partial(preflight, complete))

    if code := guarded(command):
        sys.exit(code)


def _hydra_main() -> None:
    from nemo.core.config import hydra_runner

    from nemo_spin.config import config_dir

    hydra_runner(config_path=str(config_dir()), config_name="gpt_spin")(run_training)()


def _score(options: argparse.Namespace) -> int:
    from nemo_spin.config.schema import ParallelConfig
    from nemo_spin.errors import ConfigError
    from nemo_spin.launch import run

    for name in ("tp", "pp", "micro_batch_size"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(options, name)}: use at least 1.")
    parallel = ParallelConfig(
        num_nodes=1,
        devices=options.tp * options.pp,
        tensor_model_parallel_size=options.tp,
        pipeline_model_parallel_size=options.pp,
        sequence_parallel=False,
        accelerator=options.accelerator,
    )

    def work() -> None:
        from nemo_spin.score import score

        score(
            checkpoint=options.checkpoint,
            data=options.data,
            output=options.output,
            tensor_model_parallel_size=options.tp,
            pipeline_model_parallel_size=options.pp,
            precision=options.precision,
            micro_batch_size=options.micro_batch_size,
            prompt_template=options.prompt_template,
            label_key=options.label_key,
            add_bos=options.add_bos,
            add_eos=options.add_eos,
        )

    return run(parallel, work)


def _with_absolute_config_path(argv: list[str]) -> list[str]:
    """Hydra looks a relative path up beside the script; here a directory in the working directory comes first."""
    made_absolute = []
    follows = False
    for argument in argv:
        prefix, path = ("", argument) if follows else ("--config-path=", argument.removeprefix("--config-path="))
        follows = argument in ("--config-path", "-cp")
        if (prefix == "" or path != argument) and Path(path).is_dir():
            argument = prefix + str(Path(path).resolve())
        made_absolute.append(argument)
    return made_absolute


def _parser() -> argparse.ArgumentParser:
    from nemo_spin import __version__

    parser = argparse.ArgumentParser(prog="nemo-spin", description="Self-Play Fine-Tuning (SPIN) on megatron-core.")
    parser.add_argument("--version", action="version", version=f"nemo-spin {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{train,score}")

    commands.add_parser(
        "train",
        usage=_TRAIN_USAGE,
        help="run SPIN on an SFT checkpoint",
        description="Run SPIN on an SFT checkpoint. KEY=VALUE overrides a key of conf/gpt_spin.yaml, as in "
        "trainer.devices=4 model.tensor_model_parallel_size=2; --cfg job prints the configuration.",
    )

    score = commands.add_parser("score", help="log-probabilities of responses under a checkpoint")
    add = score.add_argument
    add("--checkpoint", required=True, metavar="CKPT", help=".nemo file, unpacked .nemo, or NeMo 2 directory")
    add(
        "--data", required=True, metavar="FILE.jsonl", help='records as for training, or {"prompt_ids", "response_ids"}'
    )
    add("--output", required=True, metavar="OUT.jsonl", help='gets {"logp", "num_tokens", "token_logps"} for each line')
    add("--tp", type=int, default=1, metavar="N", help="tensor-parallel size (default 1)")
    add("--pp", type=int, default=1, metavar="N", help="pipeline-parallel size (default 1)")
    add("--precision", choices=["32", "bf16"], default="32", help="of the computation (default 32)")
    add("--micro-batch-size", type=int, default=8, metavar="N", help="responses per forward pass (default 8)")
    add("--prompt-template", default="{input} {output}", help='how a record becomes text (default "{input} {output}")')
    add("--label-key", default="output", help="the response's key in a record (default output)")
    boolean = argparse.BooleanOptionalAction
    add("--add-bos", action=boolean, default=False, help="begin prompts with the BOS token (default no)")
    add("--add-eos", action=boolean, default=True, help="end responses with the EOS token (default yes)")
    add("--accelerator", choices=["auto", "gpu", "cpu"], default="auto", help="(default auto: GPUs if there are any)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
