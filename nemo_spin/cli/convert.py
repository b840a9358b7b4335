"""`nemo-spin convert`: its command line."""

from __future__ import annotations

import argparse
from typing import Any

FORMATS = {
    "nemo": "NeMo 1's .nemo archive",
    "nemo2": "NeMo 2's directory",
    "megatron": "a directory for Megatron-LM and Megatron-Bridge",
    "hf": "Hugging Face's directory with safetensors",
}


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "convert",
        help="write a checkpoint as one of another family",
        description="Write a checkpoint of any family as one of another: weights (their bits stay the same), "
        "configuration and tokenizer. It needs memory for a piece of the weights only. Formats: "
        + "; ".join(f"{name}: {what}" for name, what in FORMATS.items())
        + ".",
    )
    add = parser.add_argument
    add("--from", dest="source", required=True, metavar="CKPT", help="any checkpoint, or a run's directory")
    add("--to", dest="target", required=True, metavar="PATH", help="what is written; the name of a .nemo ends in .nemo")
    add("--format", dest="file_format", required=True, choices=FORMATS, help="of what is written")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="to put in: Hugging Face directory or name, sentencepiece .model, or tiktoken .json",
    )
    which.add_argument("--no-tokenizer", action="store_true", help="leave the tokenizer out")
    add("--overwrite", action="store_true", help="replace what is there")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from nemo_spin.commands.convert import convert

    notes = convert(
        options.source,
        options.target,
        options.file_format,
        tokenizer_path=options.tokenizer,
        with_tokenizer=not options.no_tokenizer,
        overwrite=options.overwrite,
    )
    for note in notes:
        print(note)
    print(f"Wrote {options.target}: {FORMATS[options.file_format]}.")
    return 0
