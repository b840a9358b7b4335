"""`nemo-spin data`: its command line."""

from __future__ import annotations

import argparse
from typing import Any

from nemo_spin.cli.options import add_bad_record_option, add_record_options, record_options
from nemo_spin.config.dataset import OVERLONG, TRUNCATION_METHODS, DatasetConfig
from nemo_spin.errors import ConfigError

# Those that are fields of the DatasetConfig by the same names, beside how a record is read.
_LOAD_OPTIONS = ("overlong", "truncation_field", "truncation_method", "on_bad_record", "cache_dir")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "data",
        help="what training would make of data files: counts, lengths, examples",
        description="Show what training would make of data files. The options are those of model.data in a run's "
        "configuration. The exit code is 2 if training would refuse the files; what is tokenized here is not tokenized "
        "again by a run with the same options.",
    )
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="JSONL, compressed JSONL, parquet, or a saved data set's directory")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--checkpoint", metavar="CKPT", help="any checkpoint: its tokenizer and its context; no weights are read"
    )
    which.add_argument(
        "--tokenizer", metavar="PATH", help="Hugging Face directory or name, sentencepiece .model, or tiktoken .json"
    )
    add_record_options(parser)
    add("--max-seq-length", type=int, metavar="N", help="longest example in tokens (default: the checkpoint's context)")
    add("--overlong", choices=OVERLONG, default="refuse", help="what becomes of longer examples (default refuse)")
    add("--truncation-field", metavar="FIELD[,FIELD]", help="fields of the template that truncate may cut")
    add("--truncation-method", choices=TRUNCATION_METHODS, default="right", help="which end is cut (default right)")
    add_bad_record_option(parser)
    add("--cache-dir", metavar="DIR", help="for the tokenized data (default: nemo_spin in the user's cache)")
    add("--examples", type=int, default=3, metavar="N", help="examples to show (default 3)")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    if options.max_seq_length is not None and options.max_seq_length < 2:
        raise ConfigError(f"--max-seq-length {options.max_seq_length}: use at least 2.")
    from nemo_spin.commands.data import show_data

    cfg = DatasetConfig(
        file_path=tuple(options.files),
        max_seq_length=options.max_seq_length,
        **{name: getattr(options, name) for name in _LOAD_OPTIONS},
        **record_options(options),
    )
    return show_data(
        cfg, checkpoint=options.checkpoint, tokenizer_path=options.tokenizer, num_examples=options.examples
    )
