"""`model.data` and `model.tokenizer`: data files, how their records become tokens, and by which tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, fields

from nemo_spin.errors import ConfigError

OVERLONG = ("refuse", "drop", "truncate")
ON_BAD_RECORD = ("error", "skip")
TRUNCATION_METHODS = ("left", "right")


@dataclass(frozen=True, slots=True)
class ChatPromptTokens:
    """The texts between the parts of a conversation, with NeMo's defaults.

    turn_start: has to be a single token, because a response ends with it.
    """

    system_turn_start: str = "<extra_id_0>"
    turn_start: str = "<extra_id_1>"
    label_start: str = "<extra_id_2>"
    end_of_turn: str = "\n"
    end_of_name: str = "\n"

    def __post_init__(self) -> None:
        for part in fields(self):
            value = getattr(self, part.name)
            if not isinstance(value, str) or not value:
                raise ConfigError(f"chat_prompt_tokens.{part.name} is {value!r}: use a text that is not empty")


@dataclass(frozen=True, slots=True)
class DatasetConfig:
    """`model.data.train_ds` or `validation_ds`: data files, and how their records become tokens.

    file_path: the files, at least one.
    prompt_template, label_key: for records that are not chats: text with {keys} of the record, the label's at the end.
    add_bos, add_eos: begin the prompt with BOS, end the response with EOS (records that are not chats).
    max_seq_length: longest example in tokens, prompt and response together; None for the model's context.
    shuffle: a new order in every epoch.
    overlong: "refuse" a file with longer examples, "drop" and count them, or "truncate" them.
    truncation_field, truncation_method: for truncate: the fields of prompt_template that may be cut, with commas
        between them, and at which end: "left" or "right".
    on_bad_record: "error", or "skip" and count records that cannot be used.
    weights: passes over each file in an epoch, as many as there are files; None for one each.
    chat_prompt_tokens: the texts between the parts of NeMo's chat records.
    cache_dir: where tokenized data are kept; None for the user's cache.
    """

    file_path: tuple[str, ...]
    prompt_template: str
    label_key: str
    add_bos: bool
    add_eos: bool
    max_seq_length: int | None
    shuffle: bool
    overlong: str
    truncation_field: str | None
    truncation_method: str
    on_bad_record: str
    weights: tuple[float, ...] | None
    chat_prompt_tokens: ChatPromptTokens
    cache_dir: str | None


@dataclass(frozen=True, slots=True)
class TokenizerConfig:
    """`model.tokenizer`: replaces the checkpoint's own; at least one of the three is set.

    library: "huggingface", "sentencepiece" or "tiktoken". type: name or directory of a Hugging Face tokenizer.
    model: sentencepiece file, or tiktoken's vocabulary.
    """

    library: str | None
    type: str | None
    model: str | None
