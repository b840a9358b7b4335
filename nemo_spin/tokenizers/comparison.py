"""Whether the tokenizer files of a directory give transformers the same tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_spin.tokenizers.base import one_line

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


def difference_in_transformers(tokenizer: Any, directory: Path, texts: Sequence[str] = ()) -> str | None:
    """What differs between the tokenizer and the one that transformers makes of the directory, or None.

    texts: samples beside the built-in ones. What is compared is the ids of the samples and the ids of eos and bos.
    """
    from transformers import AutoTokenizer

    try:
        theirs = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        for text in (*_TEXTS, *texts):
            ours, found = tokenizer.encode(text), theirs.encode(text, add_special_tokens=False)
            if ours != found:
                return f"{text!r} is {ours[:12]}, but {found[:12]} there"
        for role in ("eos", "bos"):
            ours, found = getattr(tokenizer, f"{role}_id"), getattr(theirs, f"{role}_token_id")
            if ours != found:
                return f"{role}_id is {ours}, but {found} there"
    except Exception as error:
        return f"it cannot be loaded: {one_line(error)[:200]}"
    return None
