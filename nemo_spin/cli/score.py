"""`nemo-spin score`: its command line."""

from __future__ import annotations

import argparse
from typing import Any

from nemo_spin.cli.options import add_model_options, add_record_options, model_options, record_options, run_in_parallel


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("score", help="log-probabilities of responses under a checkpoint")
    add = parser.add_argument
    add(
        "--data", required=True, metavar="FILE.jsonl", help='records as for training, or {"prompt_ids", "response_ids"}'
    )
    add("--output", required=True, metavar="OUT.jsonl", help='gets {"logp", "num_tokens", "token_logps"} for each line')
    add_model_options(parser, micro_batch_help="responses per forward pass")
    add_record_options(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    def work() -> None:
        from nemo_spin.commands.score import score

        score(
            checkpoint=options.checkpoint,
            model_options=model_options(options),
            data=options.data,
            output=options.output,
            micro_batch_size=options.micro_batch_size,
            record_options=record_options(options),
        )

    return run_in_parallel(options, work)
