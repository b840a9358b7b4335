"""Writes tokenizer files for transformers, and keeps them only if it tokenizes as the original does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_spin.errors import one_line
from nemo_spin.model_io.tokenizers.conversion import write_files

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# What tokenizers disagree on: spaces at either end and in runs, line breaks, digits, case, accents, other scripts,
# characters outside the vocabulary, code.
_TEXTS = (
    "one two three",
    " leading and trailing ",
    "two  spaces,   three spaces",
    "a\nb\n\nc\n",
    "\ttab\r\nend",
    "1234567890 3.14 1,000,000",
    "Don't STOP me; I've won!?",
    "naïve café — “quoted” … fi ½",
    "日本語のテキスト 中文 한국어 العربية हिन्दी",
    "emoji 🙂👍🏽 and ☯ symbols",
    "def f(x):\n    return x ** 2  # comment\n",
    "<|im_start|>user\n[INST] x [/INST]<extra>",
)


def write_and_compare(
    tokenizer: Any,
    convert: Callable[[], Tokenizer],
    roles: Mapping[str, str],
    directory: Path,
    texts: Sequence[str] = (),
) -> str | None:
    """Write tokenizer.json and tokenizer_config.json, and compare what transformers makes of them with the tokenizer.

    roles: "bos_token", ... -> token. texts: samples beside the built-in ones. Returns None, or what differs, and then
    neither file is there.
    """
    try:
        write_files(convert(), roles, directory)
        problem = _difference(tokenizer, directory, texts)
    except Exception as error:
        problem = one_line(error)[:200]
    if problem is not None:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (directory / name).unlink(missing_ok=True)
    return problem


def _difference(tokenizer: Any, directory: Path, texts: Sequence[str]) -> str | None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    for text in (*_TEXTS, *texts):
        ours, found = tokenizer.encode(text), theirs.encode(text, add_special_tokens=False)
        if ours != found:
            both = zip(ours, found, strict=False)
            place = next((index for index, (a, b) in enumerate(both) if a != b), min(len(ours), len(found)))
            here, there = ours[place : place + 5], found[place : place + 5]
            return f"of {text!r}, token {place} and what follows is {here}, but {there} there"
    for role in ("eos", "bos"):
        ours, found = getattr(tokenizer, f"{role}_id"), getattr(theirs, f"{role}_token_id")
        if ours != found:
            return f"{role}_id is {ours}, but {found} there"
    return None
