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
    """

    vocab_size: int
    eos_id: int
    bos_id: int | None
    pad_id: int
    space_sensitive: bool

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
