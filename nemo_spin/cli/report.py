"""`nemo-spin report`: its command line."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("report", help="an HTML page on a run: curves, warnings, sampled responses")
    add = parser.add_argument
    add("run_dir", type=Path, metavar="RUN_DIR", help="directory of a run (exp_manager.explicit_log_dir)")
    add("--output", type=Path, metavar="FILE", help="the page (default RUN_DIR/report.html)")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from nemo_spin.reporting.page import write_report

    print(write_report(options.run_dir, options.output))
    return 0
