"""The data and tokenizer sections of a configuration: types, ranges, and templates that have to be well-formed."""

from __future__ import annotations

from dataclasses import fields

from nemo_spin.config.dataset import (
    ON_BAD_RECORD,
    OVERLONG,
    TRUNCATION_METHODS,
    ChatPromptTokens,
    DatasetConfig,
    TokenizerConfig,
)
from nemo_spin.config.prompt_template import DEFAULT_LABEL_KEY, DEFAULT_TEMPLATE, check_template, check_truncation_field
from nemo_spin.config.values import Section
from nemo_spin.errors import ConfigError, MissingKeyError


def parse_validation(data: Section) -> DatasetConfig | None:
    """`model.data.validation_ds`; None for no validation. Raises ConfigError."""
    section = data.section("validation_ds")
    if section.is_to_be_given("file_path"):
        path = section.path_of("file_path")
        raise MissingKeyError(f"{path} is missing: set it, or set it to null for no validation.", path)
    return None if section.get("file_path") is None else parse_dataset(section, data, shuffle=False)


def parse_dataset(section: Section, data: Section, shuffle: bool) -> DatasetConfig:
    """`model.data.train_ds` or `validation_ds`, with what both have in `model.data`. shuffle: the default.

    Raises ConfigError.
    """
    if section.flag("add_sep", False):
        raise section.error("add_sep", "only false is supported")
    file_path = section.paths("file_path")
    dataset = DatasetConfig(
        file_path=file_path,
        prompt_template=section.text("prompt_template", DEFAULT_TEMPLATE),
        label_key=section.text("label_key", DEFAULT_LABEL_KEY),
        add_bos=section.flag("add_bos", False),
        add_eos=section.flag("add_eos", True),
        max_seq_length=section.optional_integer("max_seq_length", minimum=2),
        shuffle=section.flag("shuffle", shuffle),
        overlong=section.choice("overlong", OVERLONG, None) or "refuse",
        truncation_field=section.text("truncation_field", None),
        truncation_method=section.choice("truncation_method", TRUNCATION_METHODS, "right"),
        on_bad_record=section.choice("on_bad_record", ON_BAD_RECORD, "error"),
        weights=_weights(section, len(file_path)),
        chat_prompt_tokens=_chat_prompt_tokens(data.section("chat_prompt_tokens")),
        cache_dir=data.text("cache_dir", None),
    )
    wrong = "prompt_template"
    try:
        check_template(dataset.prompt_template, dataset.label_key)
        if dataset.overlong == "truncate":
            wrong = "truncation_field" if dataset.truncation_field else "overlong"
            if dataset.truncation_field is None:
                raise ConfigError("overlong: truncate needs a truncation_field, the field that may be cut.")
            check_truncation_field(dataset.truncation_field, dataset.prompt_template, dataset.label_key)
    except ConfigError as error:
        raise ConfigError(f"{section.name}: {error}", section.path_of(wrong)) from None
    return dataset


def _weights(section: Section, num_files: int) -> tuple[float, ...] | None:
    if section.get("weights") is None:
        return None
    weights = section.numbers("weights", ())
    if len(weights) != num_files or not all(weight > 0 for weight in weights):
        raise section.error(
            "weights", f"give a number above 0 for each file of file_path, of which there are {num_files}"
        )
    return weights


def _chat_prompt_tokens(section: Section) -> ChatPromptTokens:
    names = [part.name for part in fields(ChatPromptTokens)]
    return ChatPromptTokens(**{name: section.text(name, getattr(ChatPromptTokens(), name)) for name in names})


def parse_tokenizer(section: Section) -> TokenizerConfig | None:
    """`model.tokenizer`; None for the checkpoint's own. Raises ConfigError."""
    library = section.choice("library", ("huggingface", "sentencepiece", "tiktoken"), None)
    kind, model = section.text("type", None), section.text("model", None)
    return TokenizerConfig(library, kind, model) if library or kind or model else None
