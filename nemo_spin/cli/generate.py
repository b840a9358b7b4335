"""`nemo-spin generate`: its command line."""

from __future__ import annotations

import argparse
from dataclasses import fields
from functools import partial
from typing import Any

from nemo_spin.cli.options import (
    add_bad_record_option,
    add_model_options,
    add_record_options,
    model_options,
    record_options,
    run_in_parallel,
)
from nemo_spin.errors import ConfigError

# Least values; those of sampling are checked as a configuration's are.
_AT_LEAST = {"rollout_batch_size": 1, "num_samples": 1, "seed": 0, "iteration": 0, "min_new_tokens": 0}


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "generate",
        help="responses of a checkpoint to prompts",
        description="Responses of a checkpoint to prompts, made as training's rollouts are: sample 0 is the response "
        "that training makes of the same prompt with the same seed, iteration and sampling options. The same command "
        "goes on with an output that an earlier one left unfinished.",
    )
    add = parser.add_argument
    add(
        "--prompts",
        required=True,
        metavar="FILE",
        help='records as for training, with or without responses, or {"prompt": text}, or {"prompt_ids"}; each may '
        'have an "id"',
    )
    add(
        "--output",
        required=True,
        metavar="OUT.jsonl",
        help='gets {"id", "sample", "prompt_ids", "response_ids", "text", "finish_reason", "logp", "num_tokens"} for '
        "each response",
    )
    add("--overwrite", action="store_true", help="begin the output anew, whatever it holds")
    add_model_options(parser, micro_batch_help="responses per forward pass when they are scored")
    add("--rollout-batch-size", type=int, default=8, metavar="N", help="responses decoded at a time (default 8)")
    add("--num-samples", type=int, default=1, metavar="N", help="responses to each prompt (default 1)")
    add("--seed", type=int, default=1234, metavar="N", help="of all responses (default 1234)")
    add("--iteration", type=int, default=0, metavar="N", help="whose random numbers are used (default 0)")
    add("--max-new-tokens", type=int, metavar="N", help="most tokens per response (default: what the context leaves)")
    add("--min-new-tokens", type=int, default=1, metavar="N", help="no stop token before so many tokens (default 1)")
    add("--greedy", action="store_true", help="the most likely token (default: sample)")
    add("--temperature", type=float, metavar="X", help="divides the logits (default 1)")
    add("--top-k", type=int, metavar="N", help="sample among the N most likely tokens (default: all)")
    add("--top-p", type=float, metavar="X", help="sample among the likeliest that make up this probability (default 1)")
    add("--repetition-penalty", type=float, metavar="X", help="above 1 disfavours tokens that occurred (default 1)")
    add(
        "--end-string",
        nargs="+",
        action="extend",
        default=[],
        metavar="S",
        help=r"texts that end a response, beside the stop tokens, such as '\nUser:'",
    )
    add_record_options(parser)
    add_bad_record_option(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    cfg = _config(options)
    from nemo_spin.commands.generate import generate, preflight

    return run_in_parallel(options, partial(generate, cfg), partial(preflight, cfg))


def _config(options: argparse.Namespace) -> Any:
    """The GenerateConfig. Raises ConfigError."""
    for name, least in _AT_LEAST.items():
        if (value := getattr(options, name)) < least:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: use at least {least}.")
    if options.max_new_tokens is not None and options.max_new_tokens < max(1, options.min_new_tokens):
        raise ConfigError(
            f"--max-new-tokens {options.max_new_tokens}: use at least 1, and at least --min-new-tokens "
            f"{options.min_new_tokens}."
        )
    if options.greedy:
        for name in ("temperature", "top_k", "top_p"):
            if getattr(options, name) is not None:
                raise ConfigError(f"--{name.replace('_', '-')} says how to sample, and --greedy not to: drop one.")
        if options.num_samples > 1:
            raise ConfigError(f"--num-samples {options.num_samples}: --greedy makes one response only; use 1.")
    from nemo_spin.config import LengthParams, SamplingParams
    from nemo_spin.config.prompt_template import unescape
    from nemo_spin.config.reading import Reader

    class Options(Reader):
        def error(self, key: str, says: str) -> ConfigError:
            option = key.replace("_", "-").removesuffix("s")
            return ConfigError(f"--{option} {values[key]}: {says}.")

    names = ("temperature", "top_k", "top_p", "repetition_penalty")
    values = {name: getattr(options, name) for name in names}
    values |= {"use_greedy": options.greedy, "end_strings": [unescape(text) for text in options.end_string]}
    reader = Options(values)
    sampling = reader.read(SamplingParams)
    for error in reader.errors:
        raise error
    records = record_options(options)
    from nemo_spin.commands.generate import GenerateConfig

    # Most fields have the name of their option.
    named = {field.name: getattr(options, field.name) for field in fields(GenerateConfig) if field.name in options}
    return GenerateConfig(
        **named,
        model=model_options(options),
        sampling=sampling,
        lengths=LengthParams(max_length=options.max_new_tokens or 0, min_length=options.min_new_tokens),
        record_options=records,
    )
