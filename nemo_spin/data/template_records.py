"""NeMo's SFT records, such as {"input", "output"}: filled into a `prompt_template`, tokenized part by part, and, where
a record is too long and the user wants it so, cut in the fields that may be cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from reprlib import repr as shortened
from typing import Any

from nemo_spin.config.prompt_template import Part, check_truncation_field, parse_template
from nemo_spin.data.tokenizer import TextTokenizer
from nemo_spin.data.values import answer_of, text_of
from nemo_spin.errors import ConfigError, DataError


class TemplateFormat:
    """Template records to token ids, as NeMo's GPTSFTDataset makes them."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        prompt_template: str,
        label_key: str,
        add_bos: bool,
        add_eos: bool,
        truncation_field: str | None,
        truncation_method: str,
    ) -> None:
        """truncation_field: names of fields that may be cut, with commas between them; None for none.

        Raises ConfigError for a template or field that cannot be used, and for `add_bos` without a BOS token.
        """
        self.tokenizer = tokenizer
        self.parts = parse_template(prompt_template, label_key)
        self.label_key = label_key
        self.add_eos = add_eos
        self.truncation_fields = check_truncation_field(truncation_field or "", prompt_template, label_key)
        self.truncation_method = truncation_method
        self.bos_ids: list[int] = []
        if add_bos:
            if tokenizer.bos_id is None:
                raise ConfigError("add_bos is true and the tokenizer has no BOS token: set add_bos: false")
            self.bos_ids = [tokenizer.bos_id]

    @property
    def keys(self) -> tuple[str, ...]:
        """The fields that the template names, the label last."""
        return tuple(part.key for part in self.parts if part.key is not None)

    def encode(
        self, record: dict[str, Any], where: str, max_length: int | None = None
    ) -> tuple[list[int], list[int], int]:
        """(prompt ids, response ids, tokens that were cut).

        max_length: tokens that both may have together; what is more is taken from the fields that may be cut, as far
        as it goes. None: nothing is cut. Raises DataError.
        """
        values = {key: self._value(record, key, where) for key in self.keys}
        answer_of(values[self.label_key], repr(self.label_key), where)
        *context, response = self._tokenized(values)
        response += [self.tokenizer.eos_id] if self.add_eos else []
        cut = 0
        if max_length is not None and self.truncation_fields:
            cut = self._cut(context, len(self.bos_ids) + sum(map(len, context)) + len(response) - max_length)
        return self.bos_ids + [token for ids in context for token in ids], response, cut

    def encode_prompt(self, record: dict[str, Any], where: str) -> list[int]:
        """The ids of the prompt; the label need not be there. Raises DataError."""
        values = {key: "" if key == self.label_key else self._value(record, key, where) for key in self.keys}
        return self.bos_ids + [token for ids in self._tokenized(values)[:-1] for token in ids]

    def _tokenized(self, values: dict[str, str]) -> list[list[int]]:
        strings = fill_template(self.parts, values, self.tokenizer.space_sensitive)
        return [self.tokenizer.encode(string) if string else [] for string in strings]

    def _value(self, record: dict[str, Any], key: str, where: str) -> str:
        if key not in record:
            found = shortened(list(record))
            raise DataError(
                f"{where}: the key {key!r} of prompt_template is missing (the record has {found}): "
                "add it, or set prompt_template and label_key"
            )
        return text_of(record[key], repr(key), where)

    def _cut(self, context: list[list[int]], excess: int) -> int:
        """Take `excess` tokens from the fields, the same number from each while it lasts; returns how many it were."""
        fields = [i for i, part in enumerate(self.parts[:-1]) if part.key in self.truncation_fields]
        shares = shares_of(max(excess, 0), [len(context[i]) for i in fields])
        for i, share in zip(fields, shares, strict=True):
            context[i] = (
                context[i][share:] if self.truncation_method == "left" else context[i][: len(context[i]) - share]
            )
        return sum(shares)


def shares_of(excess: int, lengths: Sequence[int]) -> list[int]:
    """How many tokens each field loses: equal shares, the first ones rounded up, as NeMo divides them.

    What a field is too short for is taken from the others, the first ones first.
    """
    equal, rest = divmod(excess, len(lengths)) if lengths else (0, 0)
    shares = [min(length, equal + (i < rest)) for i, length in enumerate(lengths)]
    for i, length in enumerate(lengths):
        shares[i] += min(length - shares[i], excess - sum(shares))
    return shares


def fill_template(parts: tuple[Part, ...], values: Mapping[str, str], space_sensitive: bool) -> list[str]:
    """The strings to tokenize, one per part, the label last.

    Values lose the spaces around them; the spaces before a placeholder belong to its string. A tokenizer that is not
    space-sensitive puts a space before every string itself, so that one leading space of each part is dropped.
    """
    strings = []
    for part in parts:
        text = part.text if space_sensitive else part.text.removeprefix(" ")
        strings.append(text if part.key is None else text + values[part.key].strip(" "))
    return strings
