"""`nemo-spin doctor`: its command line."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="what a run would find here, and what it would make of a configuration",
        description="Show which packages and GPUs are here and what the absence of each costs. With --config or "
        "KEY=VALUE, also what becomes of every key: honoured, translated, of no effect, or refused, and which values "
        "are missing. Neither the checkpoint nor the data need be there. The exit code is 2 if a run could not begin.",
    )
    add = parser.add_argument
    add("--config", type=Path, metavar="FILE", help="a run's YAML file, ours or NeMo-Aligner's (default: the shipped)")
    add("overrides", nargs="*", metavar="KEY=VALUE", help="as for nemo-spin train")
    add("--json", action="store_true", help="for machines: one JSON object")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from nemo_spin.commands.doctor import diagnose

    return diagnose(options.config, options.overrides, options.json)
