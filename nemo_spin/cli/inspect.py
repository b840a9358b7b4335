"""`nemo-spin inspect`: its command line."""

from __future__ import annotations

import argparse
import json
from typing import Any

from nemo_spin.errors import EXIT_CODE


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "inspect",
        help="what a checkpoint is: family, architecture, layouts, tokenizer, what is missing",
        description="Show what a checkpoint is, from its descriptions alone. The exit code is 2 if it cannot be used.",
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="any checkpoint, or a run's directory with several")
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from nemo_spin.commands.inspect import as_text, inspect_checkpoint

    found = inspect_checkpoint(options.checkpoint)
    print(json.dumps(found, indent=2) if options.json else as_text(found))
    return EXIT_CODE if found["architecture"] is None else 0
