"""Conversations in OpenAI's form, [{"role", "content"}, ...], as the tokenizer's chat template renders them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from reprlib import repr as shortened
from typing import Any

from nemo_spin.data.tokenizer import TextTokenizer, encode_after, encode_in_two
from nemo_spin.data.values import answer_of, kind_of, located, text_of
from nemo_spin.errors import DataError

_ROLES = ("system", "user", "assistant")
_TOOL_KEYS = ("tool_calls", "function_call", "tool_call_id")
_PROBE = "Selfplay"
_SPECIAL = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")


@dataclass(frozen=True, slots=True)
class StopToken:
    text: str
    id: int


class ChatFormat:
    """Messages to token ids: those of the tokenizer's own chat template, up to the stop token of the last turn."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer

    @cached_property
    def end_of_turn(self) -> StopToken | None:
        """See `find_end_of_turn`. Raises DataError."""
        return find_end_of_turn(self.tokenizer)

    def encode(self, messages: Any, name: str, where: str, may_be_empty: bool = False) -> tuple[list[int], list[int]]:
        """(prompt ids, response ids): the response is the last turn, which has to be the assistant's.

        name: the key of the messages. may_be_empty: whether the response may have no text. Raises DataError.
        """
        check_messages(messages, name, where)
        last = messages[-1]
        if last["role"] != "assistant":
            raise DataError(
                f"{where}: the last turn is {last['role']!r}: a conversation must end with the assistant's response"
            )
        if not may_be_empty:
            answer_of(last["content"], f"{name}[{len(messages) - 1}]['content']", where)
        prompt = self._render(messages[:-1], where, add_generation_prompt=True)
        conversation = self._render(messages, where, add_generation_prompt=False)
        if not conversation.startswith(prompt):
            raise DataError(
                f"{where}: the chat template rewrites history: with the answer the conversation begins differently "
                "from the prompt alone, so that no response can be told apart: use a template that only appends"
            )
        return self._in_two(prompt, conversation[len(prompt) :], where)

    def encode_prompt(self, messages: Any, name: str, where: str) -> list[int]:
        """The ids of a conversation that the assistant is to go on with; its own last turn, if there is one, is left
        out. Raises DataError."""
        check_messages(messages, name, where)
        if messages[-1]["role"] == "system":
            raise DataError(f"{where}: the conversation has no user's turn: add what the assistant is to answer")
        asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        return self.tokenizer.encode(self._render(asked, where, add_generation_prompt=True))

    def _render(self, messages: list[dict[str, Any]], where: str, add_generation_prompt: bool) -> str:
        with located(where):
            text = self.tokenizer.render_chat(messages, add_generation_prompt)
        # a template may use more of a message than its role and content
        return text_of(text, "what the chat template makes of the messages", where)

    def _in_two(self, prompt: str, response: str, where: str) -> tuple[list[int], list[int]]:
        with located(where):
            end = self.end_of_turn
        if end is None or end.text not in response:
            prompt_ids, response_ids = encode_in_two(self.tokenizer, prompt, response)
            return prompt_ids, [*response_ids, self.tokenizer.eos_id]
        answer = response[: response.rindex(end.text)]
        prompt_ids, response_ids = encode_in_two(self.tokenizer, prompt, answer + end.text)
        if response_ids[-1:] != [end.id]:
            response_ids = [*encode_after(self.tokenizer, answer), end.id]
        return prompt_ids, response_ids


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


def check_messages(messages: Any, name: str, where: str) -> None:
    """Raise DataError unless these are turns with text: perhaps the system's, then the user's and the assistant's by
    turns, the user's first."""
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: {name!r} must be a list of turns, found {kind_of(messages)}")
    for number, message in enumerate(messages):
        turn = f"{name}[{number}]"
        if not isinstance(message, dict):
            raise DataError(f"{where}: {turn} must be an object with 'role' and 'content', found {kind_of(message)}")
        _check_turn(message, turn, where)
    if messages[-1]["role"] == "assistant" and len(messages) == 1:
        raise DataError(f"{where}: the conversation has only the assistant's turn: put what it answers before it")
    first = 1 if messages[0]["role"] == "system" else 0
    for number, message in enumerate(messages[first:], start=first):
        expected = ("user", "assistant")[(number - first) % 2]
        if message["role"] != expected:
            raise DataError(
                f"{where}: {name}[{number}] is a turn of the {message['role']} where the {expected}'s is due: "
                "after the system's text the turns of user and assistant alternate"
            )


def _check_turn(message: dict[str, Any], turn: str, where: str) -> None:
    role = message.get("role")
    tool_key = next((key for key in _TOOL_KEYS if message.get(key)), None)
    if role in ("tool", "function"):
        raise DataError(f"{where}: {turn} is a {role} turn; tool use is not supported: remove that record")
    if tool_key:
        raise DataError(f"{where}: {turn} has {tool_key!r}; tool use is not supported: remove that record")
    if role not in _ROLES:
        raise DataError(f"{where}: {turn} has the role {shortened(role)}: use one of {', '.join(_ROLES)}")
    if "content" not in message:
        raise DataError(f"{where}: {turn} has no 'content': add its text")
    text_of(message["content"], f"{turn}['content']", where)
