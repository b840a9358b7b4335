"""One record of a data file to the token ids of its prompt and of its response.

The kinds of record, told apart by their keys:
- {"prompt_ids": [...], "response_ids": [...]}: token ids, used as they are;
- {"messages": [{"role", "content"}, ...]}: a conversation in OpenAI's form, rendered by the tokenizer's chat template;
- {"real": [messages], "generated": [messages]}: the SPIN release's pairs; the second is a rejected response;
- {"conversations": [{"from", "value"}, ...]}: NeMo's chat records, rendered with `chat_prompt_tokens`;
- anything else: NeMo's SFT records, such as {"input", "output"}, filled into `prompt_template`.

A key that `prompt_template` names is a field of the template.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from nemo_spin.config.dataset import TRUNCATION_METHODS, ChatPromptTokens
from nemo_spin.config.prompt_template import DEFAULT_LABEL_KEY, DEFAULT_TEMPLATE
from nemo_spin.data.chat import ChatFormat
from nemo_spin.data.conversations import ConversationFormat
from nemo_spin.data.template_records import TemplateFormat
from nemo_spin.data.tokenizer import TextTokenizer
from nemo_spin.data.values import ids_of, text_of
from nemo_spin.errors import ConfigError, DataError

IDS, MESSAGES, PAIRS, CONVERSATIONS, TEMPLATE = "token ids", "messages", "real/generated", "conversations", "template"

_MARKS = {
    "prompt_ids": IDS,
    "response_ids": IDS,
    "real": PAIRS,
    "generated": PAIRS,
    "messages": MESSAGES,
    "conversations": CONVERSATIONS,
}


@dataclass(frozen=True, slots=True)
class Encoded:
    """A record in tokens.

    prompt_ids, response_ids: at least one each; the response includes its stop token.
    rejected_ids: a response that came with the record as the worse one, None where there is none.
    kind: the format it was found to have.
    cut: number of tokens that its fields have lost.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    rejected_ids: list[int] | None
    kind: str
    cut: int = 0


class RecordEncoder:
    """Records to token ids, with one tokenizer and one set of options."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        *,
        prompt_template: str = DEFAULT_TEMPLATE,
        label_key: str = DEFAULT_LABEL_KEY,
        add_bos: bool = False,
        add_eos: bool = True,
        chat_prompt_tokens: ChatPromptTokens | None = None,
        truncation_field: str | None = None,
        truncation_method: str = "right",
    ) -> None:
        """`add_bos` and `add_eos` are for template records: a chat template writes its own special tokens.

        truncation_field, truncation_method: fields of template records that `encode` may cut, and at which end.

        Raises ConfigError for a template or option that cannot be used.
        """
        if truncation_method not in TRUNCATION_METHODS:
            raise ConfigError(f"truncation_method is {truncation_method!r}: use left or right")
        self.tokenizer = tokenizer
        self._template = TemplateFormat(
            tokenizer, prompt_template, label_key, add_bos, add_eos, truncation_field, truncation_method
        )
        self._chat = ChatFormat(tokenizer)
        self._conversations = ConversationFormat(tokenizer, chat_prompt_tokens or ChatPromptTokens())
        self._seen: set[str] = set()

    def kind(self, record: dict[str, Any]) -> str:
        """The format of a record."""
        fields = self._template.keys
        return next((kind for key, kind in _MARKS.items() if key in record and key not in fields), TEMPLATE)

    def encode(self, record: dict[str, Any], where: str, max_length: int | None = None) -> Encoded:
        """The record in tokens.

        max_length: most tokens of prompt and response. What is longer is cut where `truncation_field` allows it, and is
        too long afterwards where it does not. None: nothing is cut.

        Raises DataError that begins with `where`, the record's file and line.
        """
        kind = self.kind(record)
        encoded = self._encode(kind, record, where, max_length)
        if not encoded.prompt_ids and encoded.cut:
            raise DataError(
                f"{where}: nothing is left of the prompt when it is cut to {max_length} tokens with its response: "
                "raise max_seq_length, or shorten the response"
            )
        if not encoded.prompt_ids:
            self._refuse_empty_prompt(kind, where)
        if not encoded.response_ids:
            raise DataError(f"{where}: the response has no tokens: fill it, or remove the record")
        self._seen.add(kind)
        return encoded

    def encode_prompt(self, record: dict[str, Any], where: str) -> list[int]:
        """The prompt in tokens, for generation. The record need not have a response; one that it has is left out.

        {"prompt": text} is used as it is. Raises DataError that begins with `where`.
        """
        kind = self.kind(record)
        if kind == IDS:
            ids = ids_of(record, "prompt_ids", self.tokenizer.vocab_size, where)
        elif kind == MESSAGES:
            _refuse_tools(record, where)
            ids = self._chat.encode_prompt(record["messages"], "messages", where)
        elif kind == PAIRS:
            name = "real" if "real" in record else "generated"
            ids = self._chat.encode_prompt(record[name], name, where)
        elif kind == CONVERSATIONS:
            ids = self._conversations.encode_prompt(record, where)
        elif "prompt" in record and "prompt" not in self._template.keys:
            ids = self._template.bos_ids + self.tokenizer.encode(text_of(record["prompt"], "'prompt'", where))
        else:
            ids = self._template.encode_prompt(record, where)
        if not ids:
            self._refuse_empty_prompt(kind, where)
        self._seen.add(kind)
        return ids

    def stop_ids(self, kinds: Collection[str] | None = None) -> frozenset[int]:
        """The ids at which generation stops for records of these kinds; None for those that were encoded so far.

        The end of text, and where conversations have one, the token after a turn. Raises DataError.
        """
        kinds = self._seen if kinds is None else kinds
        ids = {self.tokenizer.eos_id}
        if {MESSAGES, PAIRS} & set(kinds) and (end := self._chat.end_of_turn):
            ids.add(end.id)
        if CONVERSATIONS in kinds:
            ids.add(self._conversations.stop_id)
        return frozenset(ids)

    def _encode(self, kind: str, record: dict[str, Any], where: str, max_length: int | None) -> Encoded:
        if kind == IDS:
            prompt, response = (
                ids_of(record, key, self.tokenizer.vocab_size, where) for key in ("prompt_ids", "response_ids")
            )
            return Encoded(prompt, response, None, kind)
        if kind == MESSAGES:
            _refuse_tools(record, where)
            return Encoded(*self._chat.encode(record["messages"], "messages", where), None, kind)
        if kind == PAIRS:
            return self._pair(record, where)
        if kind == CONVERSATIONS:
            return Encoded(*self._conversations.encode(record, where), None, kind)
        prompt, response, cut = self._template.encode(record, where, max_length)
        return Encoded(prompt, response, None, kind, cut)

    def _pair(self, record: dict[str, Any], where: str) -> Encoded:
        for key in ("real", "generated"):
            if key not in record:
                raise DataError(f"{where}: {key!r} is missing: a record of pairs needs 'real' and 'generated'")
        prompt, response = self._chat.encode(record["real"], "real", where)
        rejected_prompt, rejected = self._chat.encode(record["generated"], "generated", where, may_be_empty=True)
        if rejected_prompt != prompt:
            raise DataError(
                f"{where}: 'real' and 'generated' have different prompts: both must answer the same conversation"
            )
        # The SPIN release leaves the text empty where nothing has been generated yet.
        given = record["generated"][-1]["content"].strip()
        return Encoded(prompt, response, rejected if given else None, PAIRS)

    def _refuse_empty_prompt(self, kind: str, where: str) -> None:
        remedy = "fill it, or set add_bos: true" if kind == TEMPLATE else "give it text"
        raise DataError(f"{where}: the prompt is empty, so that nothing predicts the response: {remedy}")


def _refuse_tools(record: dict[str, Any], where: str) -> None:
    for key in ("tools", "functions"):
        if record.get(key):
            raise DataError(f"{where}: {key!r} are not supported: remove that record")
