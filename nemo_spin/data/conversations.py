"""NeMo's chat records: {"conversations": [{"from", "value", "label"?}], "system", "mask", "type"}.

They are rendered as NeMo's chat data sets render them, with `chat_prompt_tokens` between the turns:

    <system_turn_start>System<end_of_name>SYSTEM<end_of_turn>
    <turn_start>FROM<end_of_name>VALUE<end_of_turn>            for every turn, without the line breaks written here
    <turn_start>                                               after the last one: the stop token of its response

`type` says what a turn's label is: VALUE_TO_TEXT puts <label_start>LABEL<end_of_name> before the value, which is
conditioned on it; TEXT_TO_VALUE puts it after the turn, where it is what the model learns to say.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from reprlib import repr as shortened
from typing import Any

from nemo_spin.config.dataset import ChatPromptTokens
from nemo_spin.data.tokenizer import TextTokenizer, encode_in_two
from nemo_spin.data.values import answer_of, kind_of, located, text_of
from nemo_spin.errors import DataError

_TYPES = (None, "VALUE_TO_TEXT", "TEXT_TO_VALUE")


@dataclass(frozen=True, slots=True)
class _Conversation:
    turns: list[dict[str, Any]]
    system: str
    mask: str
    type: str | None


class ConversationFormat:
    """NeMo's chat records to token ids. The whole conversation is tokenized at once, as NeMo does."""

    def __init__(self, tokenizer: TextTokenizer, tokens: ChatPromptTokens) -> None:
        self.tokenizer = tokenizer
        self.tokens = tokens

    @cached_property
    def stop_id(self) -> int:
        """The id of `turn_start`. Raises DataError unless it is a single token, in a text as well."""
        text = self.tokens.turn_start
        token = self.tokenizer.id_of(text)
        if token is None or self.tokenizer.encode(f"a{self.tokens.end_of_turn}{text}")[-1:] != [token]:
            raise DataError(
                f"chat_prompt_tokens.turn_start {text!r} is not a single token of the tokenizer, so that generation "
                "could not stop at it: set model.data.chat_prompt_tokens to the tokens that the model was trained with"
            )
        return token

    def encode(self, record: dict[str, Any], where: str) -> tuple[list[int], list[int]]:
        """(prompt ids, response ids): the response is the last turn's text, or its label for TEXT_TO_VALUE, up to the
        `turn_start` after it. Raises DataError."""
        conversation = _parse(record, where)
        last = conversation.turns[-1]
        name = f"conversations[{len(conversation.turns) - 1}]"
        if last["from"] == conversation.mask:
            raise DataError(
                f"{where}: the last turn is from {last['from']!r}, whom 'mask' leaves out of the training: "
                "a conversation must end with a response"
            )
        with located(where):
            _ = self.stop_id
        if conversation.type == "TEXT_TO_VALUE":
            answer = answer_of(last.get("label"), f"{name}['label']", where) + self.tokens.end_of_name
        else:
            answer = answer_of(last["value"], f"{name}['value']", where) + self.tokens.end_of_turn
        prompt = self._prompt(conversation)
        return encode_in_two(self.tokenizer, prompt, answer + self.tokens.turn_start)

    def encode_prompt(self, record: dict[str, Any], where: str) -> list[int]:
        """The ids of a conversation that is to be gone on with: a last turn that is a response is left out.

        Where the last turn is from the masked speaker, the other one answers, "Assistant" if it has said nothing yet.
        Raises DataError.
        """
        conversation = _parse(record, where)
        with located(where):
            _ = self.stop_id
        if conversation.turns[-1]["from"] != conversation.mask:
            return self.tokenizer.encode(self._prompt(conversation))
        others = [turn["from"] for turn in conversation.turns if turn["from"] != conversation.mask]
        answering = {"from": others[-1] if others else "Assistant", "value": ""}
        turns = [*conversation.turns, answering]
        asked = _Conversation(turns, conversation.system, conversation.mask, conversation.type)
        return self.tokenizer.encode(self._prompt(asked))

    def _prompt(self, conversation: _Conversation) -> str:
        """The text up to the response, which is the last turn's."""
        tokens, kind = self.tokens, conversation.type
        text = f"{tokens.system_turn_start}System{tokens.end_of_name}{conversation.system}{tokens.end_of_turn}"
        for number, turn in enumerate(conversation.turns, start=1):
            label = turn.get("label")
            labelled = "" if label is None else f"{tokens.label_start}{label}{tokens.end_of_name}"
            text += f"{tokens.turn_start}{turn['from']}{tokens.end_of_name}"
            if kind == "VALUE_TO_TEXT":
                text += labelled
            if number < len(conversation.turns):
                text += f"{turn['value']}{tokens.end_of_turn}{labelled if kind == 'TEXT_TO_VALUE' else ''}"
            elif kind == "TEXT_TO_VALUE":
                text += f"{turn['value']}{tokens.end_of_turn}{tokens.label_start}"
        return text


def _parse(record: dict[str, Any], where: str) -> _Conversation:
    turns, kind = record["conversations"], record.get("type")
    if kind not in _TYPES:
        raise DataError(f"{where}: 'type' is {shortened(kind)}: use VALUE_TO_TEXT, TEXT_TO_VALUE or null")
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: 'conversations' must be a list of turns, found {kind_of(turns)}")
    for number, turn in enumerate(turns):
        name = f"conversations[{number}]"
        if not isinstance(turn, dict):
            raise DataError(f"{where}: {name} must be an object with 'from' and 'value', found {kind_of(turn)}")
        for key in ("from", "value"):
            if key not in turn:
                raise DataError(f"{where}: {name} has no {key!r}: add it")
            text_of(turn[key], f"{name}[{key!r}]", where)
        if turn.get("label") is not None:
            text_of(turn["label"], f"{name}['label']", where)
    mask, system = record.get("mask"), record.get("system")
    mask = "User" if mask is None else text_of(mask, "'mask'", where)
    speakers = [turn["from"] for turn in turns]
    if mask not in speakers:
        found = ", ".join(map(repr, dict.fromkeys(speakers)))
        raise DataError(
            f"{where}: no turn is from {mask!r}, whom 'mask' leaves out of the training (the turns are from {found}): "
            "set 'mask' to the one whom the model answers"
        )
    return _Conversation(turns, "" if system is None else text_of(system, "'system'", where), mask, kind)
