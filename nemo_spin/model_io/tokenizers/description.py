"""Which tokenizer belongs to a checkpoint, as its configuration says it: data only, nothing is loaded here.

`nemo_spin.model_io.tokenizers.build_tokenizer` makes the tokenizer.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_spin.errors import CheckpointError, ConfigError

_TIKTOKEN_OPTIONS = ("encoding_name", "num_special_tokens", "pattern", "vocab_size")
_TEXT_OPTIONS = ("encoding_name", "pattern")
# The largest vocabularies have some 300,000.
_MOST_IDS = 10_000_000
_LIBRARY_OF = {".model": "sentencepiece", ".json": "tiktoken"}
OVERRIDE_HINT = (
    "give one that is at hand, for example model.tokenizer.type=/path/to/huggingface_tokenizer_directory to training, "
    "and --tokenizer PATH to other commands"
)


@dataclass(frozen=True)
class TokenizerDescription:
    """
    library: "huggingface", "sentencepiece" or "tiktoken"; whatever else a configuration says is refused when it is
        built.
    source: directory or name of a Hugging Face tokenizer, file of a sentencepiece model, or vocabulary of tiktoken; a
        relative path is looked up in the checkpoint's files first. None when the configuration names none.
    origin: where this description comes from, for messages.
    legacy: NeMo's legacy mode of sentencepiece, in which special tokens are added beside the model.
    special_tokens: role ("bos_token", ...) -> token, or a list of tokens; as configured.
    use_fast: for Hugging Face, whether the fast implementation is preferred.
    options: for tiktoken, what else NeMo's tokenizer is given: vocab_size, num_special_tokens, pattern.
    """

    library: str
    source: str | None
    origin: str
    legacy: bool = False
    special_tokens: dict[str, str] | list[str] = field(default_factory=dict)
    chat_template: str | None = None
    use_fast: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises CheckpointError for what is of another kind than above: a forged configuration may say anything."""
        for name, kind in (("library", str), ("source", str | None), ("chat_template", str | None)):
            _check(isinstance(getattr(self, name), kind), self.origin, name)
        tokens = self.special_tokens
        flat = [*tokens.values(), *tokens] if isinstance(tokens, Mapping) else tokens
        _check(isinstance(flat, list) and all(map(_is_token, flat)), self.origin, "special_tokens")
        for name, value in self.options.items():
            whole = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST_IDS
            _check(whole or (name in _TEXT_OPTIONS and isinstance(value, str)), self.origin, name)


def _check(is_so: bool, origin: str, name: str) -> None:
    if not is_so:
        raise CheckpointError(f"{origin} describes a tokenizer whose {name} is of the wrong kind: {OVERRIDE_HINT}.")


def _is_token(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(token, str) for token in value))


def from_nemo1(config: Mapping[str, Any], origin: str) -> TokenizerDescription:
    """From the `tokenizer` node of a model_config.yaml.

    Raises CheckpointError if there is none.
    """
    node = config.get("tokenizer")
    if not isinstance(node, Mapping) or not node.get("library"):
        raise CheckpointError(f"{origin} has no tokenizer.library: {OVERRIDE_HINT}.")
    library, kind = str(node["library"]), node.get("type")
    model = node.get("model") or node.get("tokenizer_model")
    if library == "megatron" and kind == "GPTSentencePieceTokenizer":
        library = "sentencepiece"
    sources = {"sentencepiece": model, "tiktoken": node.get("vocab_file") or model}
    special_tokens = _given(node.get("special_tokens"))
    additional = _listed(node.get("additional_special_tokens"))
    if additional:
        special_tokens = [*_values(special_tokens), *additional]
    template = node.get("chat_template")
    return TokenizerDescription(
        library=library,
        source=sources.get(library, kind),
        origin=origin,
        legacy=bool(node.get("sentencepiece_legacy", library == "sentencepiece")),
        special_tokens=special_tokens,
        chat_template=template if isinstance(template, str) else None,
        use_fast=bool(node.get("use_fast", True)),
        options=_tiktoken_options(node) if library == "tiktoken" else {},
    )


def _tiktoken_options(node: Mapping[str, Any]) -> dict[str, Any]:
    return {key: node[key] for key in _TIKTOKEN_OPTIONS if node.get(key) is not None}


def _given(special_tokens: Any) -> Any:
    """Without the roles that are left to the tokenizer."""
    if isinstance(special_tokens, Mapping):
        return {role: token for role, token in special_tokens.items() if token is not None}
    return special_tokens or {}


def _listed(tokens: Any) -> list[Any]:
    return list(tokens) if isinstance(tokens, (list, tuple)) else []


def _values(special_tokens: Mapping[str, str] | list[str]) -> list[str]:
    return list(special_tokens.values()) if isinstance(special_tokens, Mapping) else list(special_tokens)


# One of them is in every directory of a Hugging Face tokenizer.
HF_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json")
HF_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


def from_nemo2(node: Any, origin: str) -> TokenizerDescription | None:
    """From the `tokenizer` node of a context/model.yaml; None when there is none."""
    if not isinstance(node, Mapping) or not node.get("_target_"):
        return None
    target = str(node["_target_"]).rsplit(".", 1)[-1]
    if target == "AutoTokenizer":
        special_tokens: dict[str, str] | list[str] = {
            role: node[role] for role in HF_ROLES if isinstance(node.get(role), str)
        }
        if additional := _listed(node.get("additional_special_tokens")):
            special_tokens = special_tokens | {"additional_special_tokens": additional}
        return TokenizerDescription(
            library="huggingface",
            source=node.get("pretrained_model_name"),
            origin=origin,
            special_tokens=special_tokens,
            chat_template=node["chat_template"] if isinstance(node.get("chat_template"), str) else None,
            use_fast=bool(node.get("use_fast", True)),
        )
    if target == "SentencePieceTokenizer":
        return TokenizerDescription(
            library="sentencepiece",
            source=node.get("model_path"),
            origin=origin,
            legacy=bool(node.get("legacy", False)),
            special_tokens=_given(node.get("special_tokens")),
        )
    if target == "TiktokenTokenizer":
        return TokenizerDescription(
            library="tiktoken",
            source=node.get("vocab_file"),
            origin=origin,
            special_tokens=node.get("special_tokens") or [],
            options=_tiktoken_options(node),
        )
    if target == "get_nmt_tokenizer":
        names = {"type": "model_name", "model": "tokenizer_model", "sentencepiece_legacy": "legacy"}
        renamed = dict(node) | {key: node.get(name) for key, name in names.items()}
        return from_nemo1({"tokenizer": {"library": "sentencepiece"} | renamed}, origin)
    return TokenizerDescription(library=target, source=None, origin=origin)


def from_huggingface(directory: Path) -> TokenizerDescription | None:
    """From the files of a Hugging Face directory; None when there is no tokenizer."""
    path = os.path.abspath(directory)
    if any((directory / name).is_file() for name in HF_FILES):
        return TokenizerDescription(library="huggingface", source=path, origin=path)
    if (directory / "tokenizer.model").is_file():
        return TokenizerDescription(library="sentencepiece", source=os.path.join(path, "tokenizer.model"), origin=path)
    return None


def override(library: str | None, type: str | None, model: str | None) -> TokenizerDescription | None:
    """From the keys of `model.tokenizer` in a run's configuration; None when none is set.

    Raises ConfigError if they do not belong together.
    """
    if not (library or type or model):
        return None
    library = library or ("sentencepiece" if model and not type else "huggingface")
    source, key = (type, "type") if library == "huggingface" else (model, "model")
    if not source:
        raise ConfigError(f"model.tokenizer.library: {library} needs model.tokenizer.{key} as well.")
    return TokenizerDescription(library=library, source=source, origin=f"model.tokenizer.{key}")


def from_path(path: str, option: str = "--tokenizer") -> TokenizerDescription:
    """From a path on the command line: a sentencepiece *.model, a *.json vocabulary of tiktoken as NeMo has it, or else
    the directory or the name of a Hugging Face tokenizer.

    option: where it was given, for messages. Raises ConfigError if a file is not there, or is only one of the files of
    a Hugging Face tokenizer.
    """
    file = Path(path).expanduser()
    if file.is_dir() or file.suffix not in _LIBRARY_OF:
        return TokenizerDescription(library="huggingface", source=path, origin=option)
    if not file.is_file():
        raise ConfigError(f"{option} {path}: there is no such file.")
    if file.suffix == ".json" and _begins_with(file, b"{"):
        # A vocabulary of tiktoken is a list.
        raise ConfigError(f"{option} {path}: this is a part of a Hugging Face tokenizer; give its directory.")
    return TokenizerDescription(library=_LIBRARY_OF[file.suffix], source=path, origin=option)


def override_from_path(path: str | None) -> dict[str, str | None]:
    """`model.tokenizer` of a configuration for a tokenizer given by its path, see `from_path`; empty for None."""
    if path is None:
        return {}
    described = from_path(path)
    return {"library": described.library, "type" if described.library == "huggingface" else "model": described.source}


def _begins_with(file: Path, character: bytes) -> bool:
    with open(file, "rb") as opened:
        return opened.read(64).lstrip().startswith(character)
