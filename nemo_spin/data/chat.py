"""Where a turn of the assistant ends: the stop token that a chat template puts after it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from nemo_spin.data.tokenizer import TextTokenizer
from nemo_spin.errors import DataError

_PROBE = "Selfplay"
_SPECIAL = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")


@dataclass(frozen=True, slots=True)
class StopToken:
    text: str
    id: int


def stop_ids(tokenizer: TextTokenizer, chat: bool) -> frozenset[int]:
    """The ids at which generation stops: the end of text and, for chat data, the chat template's end of turn.

    Raises DataError when `chat` is set and there is no usable chat template.
    """
    end_of_turn = find_end_of_turn(tokenizer) if chat else None
    return frozenset({tokenizer.eos_id} | ({end_of_turn.id} if end_of_turn else set()))


def find_end_of_turn(tokenizer: TextTokenizer) -> StopToken | None:
    """The first single token that the chat template puts after an assistant's text, None when there is no such token.

    It is read off a small conversation rather than off the data, whose text may hold anything. Raises DataError.
    """
    conversation = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": _PROBE}]
    _, probe, suffix = tokenizer.render_chat(conversation, add_generation_prompt=False).rpartition(_PROBE)
    if not probe:
        raise DataError("the chat template leaves out what the assistant says: give the tokenizer another one")
    for text in [*_SPECIAL.findall(suffix), suffix.strip()]:
        token_id = tokenizer.id_of(text) if text else None
        if token_id is not None:
            return StopToken(text, token_id)
    return None
