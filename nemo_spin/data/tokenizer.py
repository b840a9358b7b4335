"""What the rest of the package asks of a tokenizer, whichever library it comes from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class TextTokenizer(Protocol):
    """Text to token ids and back, without ever adding a special token of its own accord.

    vocab_size: number of ids that the tokenizer can produce, added tokens included.
    eos_id, bos_id, pad_id: `bos_id` is None when there is no such token; `pad_id` falls back to `eos_id`.
    space_sensitive: NeMo's sense of the word: "A B" tokenizes to the tokens of "A" and those of " B". When it is false
        (sentencepiece, which puts a space before every text), they are those of "A" and those of "B".
    fingerprint: differs between tokenizers that may give other ids, or another rendering, for the same record.
    """

    vocab_size: int
    eos_id: int
    bos_id: int | None
    pad_id: int
    space_sensitive: bool

    @property
    def fingerprint(self) -> str: ...

    def encode(self, text: str) -> list[int]:
        """Token ids of the text, no special tokens added."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def render_chat(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        """The conversation as text by the tokenizer's chat template.

        Raises DataError when there is no chat template, or when it refuses the conversation.
        """
        ...

    def id_of(self, token: str) -> int | None:
        """The id when the whole string is one token of the vocabulary, else None."""
        ...


def encode_in_two(tokenizer: TextTokenizer, prompt: str, response: str) -> tuple[list[int], list[int]]:
    """The ids of a prompt and of the response that follows it without a break.

    They are those of the whole text where the prompt's own ids begin it. Where a token would straddle the border, they
    are made apart: generation starts after the prompt's ids, whatever the response is.
    """
    prompt_ids = tokenizer.encode(prompt)
    whole = tokenizer.encode(prompt + response)
    if whole[: len(prompt_ids)] == prompt_ids:
        return prompt_ids, whole[len(prompt_ids) :]
    return prompt_ids, encode_after(tokenizer, response)


def encode_after(tokenizer: TextTokenizer, text: str) -> list[int]:
    """The ids of text that does not begin a document: without the space that some tokenizers put before every text."""
    line_break = tokenizer.encode("\n")
    ids = tokenizer.encode("\n" + text)
    return ids[len(line_break) :] if ids[: len(line_break)] == line_break else tokenizer.encode(text)
