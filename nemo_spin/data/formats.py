"""One record of a data file to the token ids of its prompt and of its response.

Three kinds of record, told apart by their keys:
- {"prompt_ids": [...], "response_ids": [...]}: token ids, used as they are;
- {"messages": [{"role", "content"}, ...]}: a conversation in OpenAI's form, rendered by the tokenizer's chat template;
- anything else: NeMo's SFT records, such as {"input", "output"}, filled into `prompt_template`.
"""

from __future__ import annotations

from functools import cached_property
from reprlib import repr as shortened
from typing import Any

from nemo_spin.data.chat import StopToken, find_end_of_turn, stop_ids
from nemo_spin.data.template import DEFAULT_LABEL_KEY, DEFAULT_TEMPLATE, check_template, fill_template, parse_template
from nemo_spin.data.tokenizer import TextTokenizer
from nemo_spin.errors import ConfigError, DataError

__all__ = ["RecordEncoder", "check_template", "has_ids", "is_chat", "stop_ids"]

PromptAndResponse = tuple[list[int], list[int]]

_ROLES = ("system", "user", "assistant")
_TOOL_KEYS = ("tool_calls", "function_call", "tool_call_id")


def is_chat(record: dict[str, Any]) -> bool:
    return "messages" in record and not has_ids(record)


def has_ids(record: dict[str, Any]) -> bool:
    return "prompt_ids" in record or "response_ids" in record


class RecordEncoder:
    """Records to token ids, with one tokenizer and one template. Nothing is truncated."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        *,
        prompt_template: str = DEFAULT_TEMPLATE,
        label_key: str = DEFAULT_LABEL_KEY,
        add_bos: bool = False,
        add_eos: bool = True,
    ) -> None:
        """`add_bos` and `add_eos` are for template records: a chat template writes its own special tokens.

        Raises ConfigError for a template that cannot be used, and for `add_bos` without a BOS token.
        """
        self.tokenizer = tokenizer
        self.parts = parse_template(prompt_template, label_key)
        self.label_key = label_key
        self.add_eos = add_eos
        self.bos_ids: list[int] = []
        if add_bos:
            if tokenizer.bos_id is None:
                raise ConfigError("add_bos is true and the tokenizer has no BOS token: set add_bos: false")
            self.bos_ids = [tokenizer.bos_id]

    def encode(self, record: dict[str, Any], where: str) -> PromptAndResponse:
        """(prompt ids, response ids), neither of them empty; the response includes its stop token.

        Raises DataError that begins with `where`, the record's file and line.
        """
        if has_ids(record):
            prompt, response = (_ids(record, key, self.tokenizer, where) for key in ("prompt_ids", "response_ids"))
            return prompt, response
        prompt, response = self._chat(record, where) if is_chat(record) else self._template(record, where)
        if not prompt:
            remedy = "give it text" if is_chat(record) else "fill it, or set add_bos: true"
            raise DataError(f"{where}: the prompt is empty, so that nothing predicts the response: {remedy}")
        if not response:
            raise DataError(f"{where}: the response is empty: fill {self.label_key!r}, or set add_eos: true")
        return prompt, response

    def _template(self, record: dict[str, Any], where: str) -> PromptAndResponse:
        values = {}
        for key in (part.key for part in self.parts if part.key is not None):
            if key not in record:
                found = shortened(list(record))
                raise DataError(
                    f"{where}: the key {key!r} of prompt_template is missing (the record has {found}): "
                    "add it, or set prompt_template and label_key"
                )
            values[key] = _text(record[key], repr(key), where)
        strings = fill_template(self.parts, values, self.tokenizer.space_sensitive)
        *context, response = [self.tokenizer.encode(string) if string else [] for string in strings]
        stop = [self.tokenizer.eos_id] if self.add_eos else []
        return self.bos_ids + [token for ids in context for token in ids], response + stop

    def _chat(self, record: dict[str, Any], where: str) -> PromptAndResponse:
        messages = _messages(record, where)
        try:
            prompt = self.tokenizer.render_chat(messages[:-1], add_generation_prompt=True)
            conversation = self.tokenizer.render_chat(messages, add_generation_prompt=False)
            end_of_turn = self._end_of_turn
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        if not conversation.startswith(prompt):
            raise DataError(
                f"{where}: the chat template rewrites history: with the answer the conversation begins differently "
                "from the prompt alone, so that no response can be told apart: use a template that only appends"
            )
        response = conversation[len(prompt) :]
        stop_id = self.tokenizer.eos_id
        if end_of_turn is not None and end_of_turn.text in response:
            response = response[: response.rindex(end_of_turn.text)]
            stop_id = end_of_turn.id
        return self.tokenizer.encode(prompt), [*(self.tokenizer.encode(response) if response else []), stop_id]

    @cached_property
    def _end_of_turn(self) -> StopToken | None:
        return find_end_of_turn(self.tokenizer)


def _text(value: Any, what: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {what} must be a string, found {_kind(value)}: write it as text")
    if "\0" in value:
        raise DataError(f"{where}: {what} holds a NUL character: remove it")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: {what} holds half of a surrogate pair at character {error.start + 1}: export the file again"
        ) from None
    return value


def _messages(record: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """The conversation, checked: known roles, text contents, an assistant's turn at the end and something before it."""
    messages = record["messages"]
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: 'messages' must be a list of turns, found {_kind(messages)}")
    for key in ("tools", "functions"):
        if record.get(key):
            raise DataError(f"{where}: {key!r} are not supported: remove that record")
    for number, message in enumerate(messages):
        turn = f"messages[{number}]"
        if not isinstance(message, dict):
            raise DataError(f"{where}: {turn} must be an object with 'role' and 'content', found {_kind(message)}")
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
        _text(message["content"], f"{turn}['content']", where)
    if messages[-1]["role"] != "assistant":
        raise DataError(
            f"{where}: the last turn is {messages[-1]['role']!r}: a conversation must end with the assistant's response"
        )
    if len(messages) == 1:
        raise DataError(f"{where}: the conversation has only the assistant's turn: put what it answers before it")
    return messages


def _ids(record: dict[str, Any], key: str, tokenizer: TextTokenizer, where: str) -> list[int]:
    if key not in record:
        raise DataError(f"{where}: {key!r} is missing: a record of token ids needs 'prompt_ids' and 'response_ids'")
    ids = record[key]
    if not isinstance(ids, list) or not ids:
        raise DataError(f"{where}: {key!r} must be a list of at least one token id, found {_kind(ids)}")
    for position, token in enumerate(ids):
        # JSON's true is an int to Python
        if type(token) is not int or not 0 <= token < tokenizer.vocab_size:
            raise DataError(
                f"{where}: {key}[{position}] is {shortened(token)}: token ids are integers from 0 to "
                f"{tokenizer.vocab_size - 1}, for this tokenizer"
            )
    return ids


def _kind(value: Any) -> str:
    """What a value is, for a sentence: its JSON type, or that it is empty."""
    if isinstance(value, list | dict) and not value:
        return "an empty list" if isinstance(value, list) else "an empty object"
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")
