"""A tokenizer that is as strict as real ones: text is UTF-8, and a chat template may use any key of a message."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment

from nemo_spin.errors import DataError

SPECIALS = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
SPECIALS += ["<extra_id_0>", "<extra_id_1>", "<extra_id_2>"]
_SPLIT = re.compile("(" + "|".join(map(re.escape, SPECIALS)) + ")")
_TEMPLATE = Environment().from_string(
    "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}\n"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if asked %}<|im_start|>assistant\n{% endif %}"
)


class BytesTokenizer:
    """One token per byte, after the special tokens."""

    eos_id, bos_id, pad_id = 2, 1, 3
    vocab_size = len(SPECIALS) + 256
    fingerprint = "bytes"

    def __init__(self, space_sensitive: bool = True) -> None:
        self.space_sensitive = space_sensitive

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in _SPLIT.split(text):
            known = piece in SPECIALS
            ids += [SPECIALS.index(piece)] if known else [len(SPECIALS) + byte for byte in piece.encode("utf-8")]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        parts = [SPECIALS[i].encode() if i < len(SPECIALS) else bytes([i - len(SPECIALS)]) for i in ids]
        return b"".join(parts).decode("utf-8", errors="replace")

    def render_chat(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        try:
            return _TEMPLATE.render(messages=messages, asked=add_generation_prompt)
        except Exception as error:
            raise DataError(f"the chat template refuses the messages: {' '.join(str(error).split())}") from None

    def id_of(self, token: str) -> int | None:
        return SPECIALS.index(token) if token in SPECIALS else None
