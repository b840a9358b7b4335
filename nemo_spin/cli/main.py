"""The command line, `nemo-spin`: which commands there are, and what becomes of their errors."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial

import nemo_spin.cli.silence_libraries  # noqa: F401
from nemo_spin.cli import convert, data, doctor, generate, inspect, report, score, train

COMMANDS = (train, data, generate, score, report, inspect, convert, doctor)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for what the user has to put right, 130 after Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if train.is_asked_for(argv):
        return train.run(argv[1:])
    options = _parser().parse_args(argv)
    from nemo_spin.cli.launch import guarded

    return guarded(partial(options.run, options))


def _parser() -> argparse.ArgumentParser:
    from nemo_spin import __version__

    parser = argparse.ArgumentParser(prog="nemo-spin", description="Self-Play Fine-Tuning (SPIN) on megatron-core.")
    parser.add_argument("--version", action="version", version=f"nemo-spin {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser
