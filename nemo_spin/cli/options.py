"""Options that commands over a checkpoint share: where it is, how it lies over processes, how records are read."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from nemo_spin.config.dataset import ON_BAD_RECORD
from nemo_spin.errors import ConfigError


def add_model_options(parser: argparse.ArgumentParser, micro_batch_help: str) -> None:
    """--checkpoint, --tokenizer, --tp, --pp, --precision, --micro-batch-size and --accelerator."""
    add = parser.add_argument
    add(
        "--checkpoint",
        required=True,
        metavar="CKPT",
        help="NeMo, Megatron or Hugging Face checkpoint, or a run's directory",
    )
    add(
        "--tokenizer",
        metavar="PATH",
        help="Hugging Face directory or name, sentencepiece .model, or tiktoken .json (default: the checkpoint's own)",
    )
    add("--tp", type=int, default=1, metavar="N", help="tensor-parallel size (default 1)")
    add("--pp", type=int, default=1, metavar="N", help="pipeline-parallel size (default 1)")
    add("--precision", choices=["32", "bf16"], default="32", help="of the computation (default 32)")
    add("--micro-batch-size", type=int, default=8, metavar="N", help=f"{micro_batch_help} (default 8)")
    add("--accelerator", choices=["auto", "gpu", "cpu"], default="auto", help="(default auto: GPUs if there are any)")


def model_options(options: argparse.Namespace) -> dict[str, Any]:
    """What `add_model_options` asked for, as `MegatronGPTSPINModel.restore_from` takes it. Raises ConfigError."""
    from nemo_spin.model_io.tokenizers.description import override_from_path

    return {
        "precision": options.precision,
        "tensor_model_parallel_size": options.tp,
        "pipeline_model_parallel_size": options.pp,
        "tokenizer": override_from_path(options.tokenizer),
    }


def add_bad_record_option(parser: argparse.ArgumentParser) -> None:
    words = "what becomes of unusable records (default error)"
    parser.add_argument("--on-bad-record", choices=ON_BAD_RECORD, default="error", help=words)


def add_record_options(parser: argparse.ArgumentParser) -> None:
    """How a record becomes token ids."""
    add, boolean = parser.add_argument, argparse.BooleanOptionalAction
    add("--prompt-template", default="{input} {output}", help='how a record becomes text (default "{input} {output}")')
    add("--label-key", default="output", help="the response's key in a record (default output)")
    add("--add-bos", action=boolean, default=False, help="begin prompts with the BOS token (default no)")
    add("--add-eos", action=boolean, default=True, help="end responses with the EOS token (default yes)")
    add(
        "--chat-prompt-token",
        action="append",
        default=[],
        metavar="NAME=TEXT",
        help=r"one of chat_prompt_tokens, such as end_of_turn='\n'; may be repeated (default: NeMo's)",
    )


def record_options(options: argparse.Namespace) -> dict[str, Any]:
    """What `add_record_options` asked for, as `RecordEncoder` takes it. Raises ConfigError."""
    return {
        "prompt_template": options.prompt_template,
        "label_key": options.label_key,
        "add_bos": options.add_bos,
        "add_eos": options.add_eos,
        "chat_prompt_tokens": _chat_prompt_tokens(options.chat_prompt_token),
    }


def _chat_prompt_tokens(assignments: list[str]) -> Any:
    from dataclasses import fields

    from nemo_spin.config.dataset import ChatPromptTokens
    from nemo_spin.config.prompt_template import unescape

    names = [part.name for part in fields(ChatPromptTokens)]
    tokens = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or name not in names:
            raise ConfigError(f"--chat-prompt-token {assignment!r}: write NAME=TEXT with one of {', '.join(names)}.")
        tokens[name] = unescape(text)
    return ChatPromptTokens(**tokens)


def run_in_parallel(
    options: argparse.Namespace, work: Callable[[], None], preflight: Callable[[], object] | None = None
) -> int:
    """Do `work` in each of the processes that --tp and --pp ask for. Returns the exit code. Raises UserError.

    preflight: the checks with which `work` begins; see `launch.run`.
    """
    from nemo_spin.cli.launch import run
    from nemo_spin.config.schema import ParallelConfig

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
    return run(parallel, work, preflight)
