"""`model.data` and `model.tokenizer`: data files, how their records become tokens, and by which tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from nemo_spin.config.prompt_template import DEFAULT_LABEL_KEY, DEFAULT_TEMPLATE
from nemo_spin.config.settings import REQUIRED, section, setting
from nemo_spin.config.values import is_list, texts
from nemo_spin.errors import ConfigError

OVERLONG = ("refuse", "drop", "truncate")
ON_BAD_RECORD = ("error", "skip")
TRUNCATION_METHODS = ("left", "right")


def _paths(value: Any) -> tuple[str, ...]:
    if is_list(value) and not value:
        raise ValueError("name at least one file")
    if not is_list(value) and not (isinstance(value, str) and value):
        raise ValueError("use a text that is not empty")
    return texts(value if is_list(value) else [value])


@dataclass(frozen=True, slots=True)
class ChatPromptTokens:
    """The texts between the parts of a conversation, with NeMo's defaults."""

    system_turn_start: str = setting("<extra_id_0>")
    """before the system's turn"""
    turn_start: str = setting("<extra_id_1>")
    """before every other turn; a single token, because a response ends with it"""
    label_start: str = setting("<extra_id_2>")
    """before a turn's label, where it has one"""
    end_of_turn: str = setting("\n")
    """after a turn"""
    end_of_name: str = setting("\n")
    """after the name of who speaks, and after a label"""

    def __post_init__(self) -> None:
        for part in fields(self):
            value = getattr(self, part.name)
            if not isinstance(value, str) or not value:
                raise ConfigError(f"chat_prompt_tokens.{part.name} is {value!r}: use a text that is not empty")


@dataclass(frozen=True, slots=True)
class DatasetConfig:
    """`model.data.train_ds`: data files, and how their records become tokens. file_path has at least one."""

    file_path: tuple[str, ...] = setting(REQUIRED, read=_paths, words="text or list of texts")
    """path of the file, or a list of paths"""
    weights: tuple[float, ...] | None = setting(None)
    """passes over each file in an epoch ([1, 0.5]: half of the second's examples in each epoch, and the others in the
    next); null: one over each"""
    prompt_template: str = setting(None, null=DEFAULT_TEMPLATE)
    """how a record that is not a chat becomes text; null stands for "{input} {output}"; see label_key"""
    label_key: str = setting(DEFAULT_LABEL_KEY)
    """key of the response, with which prompt_template has to end"""
    add_bos: bool = setting(False)
    """begin the prompt with the BOS token (records that are not chats)"""
    add_eos: bool = setting(True)
    """end the response with the EOS token (records that are not chats)"""
    max_seq_length: int | None = setting(None, minimum=2)
    """longest example in tokens, prompt and response together; null: the context"""
    shuffle: bool = setting(True)
    """a new order in every epoch"""
    overlong: str = setting(None, null="refuse", choices=OVERLONG)
    """longer examples: refuse the file, drop and count them, or truncate them; null: truncate where truncation_field is
    given, else refuse"""
    truncation_field: str | None = setting(None)
    """for truncate: the field of prompt_template that may be cut, or several ("input,context")"""
    truncation_method: str = setting("right", choices=TRUNCATION_METHODS)
    """which end of it loses tokens: right or left"""
    on_bad_record: str = setting("error", choices=ON_BAD_RECORD)
    """records that cannot be used: error, or skip and count them by reason"""
    chat_prompt_tokens: ChatPromptTokens = section("model.data.chat_prompt_tokens", default_factory=ChatPromptTokens)
    """between the parts of {"conversations": [...]}, as the model was trained"""
    cache_dir: str | None = setting(None, name="model.data.cache_dir")
    """directory for the tokenized data; null: $XDG_CACHE_HOME/nemo_spin or ~/.cache/nemo_spin"""


@dataclass(frozen=True, slots=True)
class ValidationConfig(DatasetConfig):
    """`model.data.validation_ds`: what is not declared here is as in `model.data.train_ds`, unless it is given."""

    file_path: tuple[str, ...] = setting(REQUIRED, read=_paths, words="text or list of texts or null")
    """path of the file, or a list of paths; null: no validation"""
    weights: None = None
    shuffle: bool = setting(False)
    """validation keeps the order of the file"""


@dataclass(frozen=True, slots=True)
class TokenizerConfig:
    """`model.tokenizer`: replaces the checkpoint's own; at least one of the three is set."""

    library: str | None = setting(None, choices=("huggingface", "sentencepiece", "tiktoken"))
    """huggingface, sentencepiece or tiktoken"""
    type: str | None = setting(None)
    """huggingface: name or directory"""
    model: str | None = setting(None)
    """sentencepiece: model file; tiktoken: vocabulary file"""
