"""Tokenizers of transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache

from nemo_spin.errors import CheckpointError, one_line
from nemo_spin.model_io.tokenizers.base import NeMoTokenizer
from nemo_spin.model_io.tokenizers.description import HF_ROLES, OVERRIDE_HINT, TokenizerDescription
from nemo_spin.model_io.tokenizers.own_files import MODEL_CONFIG, PATTERNS, as_directory, read_own_files

_NEMO2_TARGET = "nemo.collections.common.tokenizers.huggingface.auto_tokenizer.AutoTokenizer"
_ADDITIONAL = "additional_special_tokens"


class HuggingFaceTokenizer(NeMoTokenizer):
    packages = ("transformers", "tokenizers")

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.tokenizer.decode(list(ids), skip_special_tokens=False)

    def id_of(self, token: str) -> int | None:
        return self._tokenizer.tokenizer.get_vocab().get(token)

    def save(self, directory: Path) -> dict[str, Any]:
        self._write_files(directory / "tokenizer")
        node: dict[str, Any] = {"library": "huggingface", "model": None}
        if self._description.special_tokens:
            node["special_tokens"] = self._description.special_tokens
        if self._description.chat_template:
            node["chat_template"] = self._description.chat_template
        return node | {"type": "nemo:tokenizer", "use_fast": self._description.use_fast}

    def save_nemo2(self, directory: Path) -> dict[str, Any]:
        self._write_files(directory / "nemo_tokenizer")
        # NeMo 2 comes with transformers 4.
        _rewrite_for_all_versions(directory / "nemo_tokenizer")
        special_tokens = self._description.special_tokens
        if isinstance(special_tokens, list):
            special_tokens = {"additional_special_tokens": special_tokens}
        roles = {role: special_tokens.get(role) for role in HF_ROLES}
        return {
            "_target_": _NEMO2_TARGET,
            "additional_special_tokens": list(special_tokens.get("additional_special_tokens", [])),
            "chat_template": self._description.chat_template,
            "include_special_tokens": False,
            "merges_file": None,
            "pretrained_model_name": "nemo_tokenizer",
            "trust_remote_code": False,
            "use_fast": self._description.use_fast,
            "vocab_file": None,
            **roles,
        }

    def save_huggingface(self, directory: Path) -> str | None:
        if self._description.special_tokens or self._description.chat_template:
            # What the checkpoint's configuration adds to the files is in no file yet.
            self._tokenizer.save_pretrained(directory)
            _rewrite_for_all_versions(directory)
        else:
            self._write_files(directory)
        return None

    def _write_files(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            (directory / name).write_bytes(content)

    def _special_id(self, role: str) -> int | None:
        found = getattr(self._tokenizer, f"{role}_id")
        return None if found is None or found < 0 else int(found)

    def _vocab_size(self) -> int:
        return max(len(self._tokenizer.tokenizer), 1 + max(self._tokenizer.tokenizer.get_vocab().values()))

    def _has_chat_template(self) -> bool:
        return bool(self._tokenizer.tokenizer.chat_template)

    def _apply_chat_template(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        return self._tokenizer.tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tokenize=False
        )


def build(description: TokenizerDescription, local: Path | None) -> HuggingFaceTokenizer:
    """local: the directory on this machine; None to look the name up in the hub's cache, and on the hub.

    Raises CheckpointError.
    """
    source = str(local or description.source or "")
    if local is None and (not source or source.startswith(("nemo:", "/", ".", "~"))):
        raise CheckpointError(
            f"{description.origin} names the tokenizer {description.source}, which is not there: {OVERRIDE_HINT}."
        )
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer

    special_tokens = _special_tokens(description)
    try:
        directory = local or _from_hub(source)
        files = read_own_files(directory)
        with as_directory(files, directory) as own:
            tokenizer = AutoTokenizer(
                str(own),
                use_fast=description.use_fast,
                trust_remote_code=False,
                chat_template=description.chat_template,
                **special_tokens,
            )
    except Exception as error:
        only_named = "" if local else ", which is given by name only and is not in the local cache,"
        raise CheckpointError(
            f"The Hugging Face tokenizer {source} of {description.origin}{only_named} cannot be loaded "
            f"({one_line(error)[:200]}): {OVERRIDE_HINT}."
        ) from None
    return HuggingFaceTokenizer(tokenizer, description, files)


def _special_tokens(description: TokenizerDescription) -> dict[str, Any]:
    """As keywords of NeMo's AutoTokenizer, which has others beside them: files to read, whether to run code."""
    given = description.special_tokens
    special_tokens = {_ADDITIONAL: given} if isinstance(given, list) else given
    if others := special_tokens.keys() - {*HF_ROLES, _ADDITIONAL}:
        raise CheckpointError(
            f"{description.origin} names the special token {min(others)}, which no Hugging Face tokenizer has: known "
            f"are {', '.join(HF_ROLES)} and {_ADDITIONAL}."
        )
    return special_tokens


def _from_hub(name: str) -> Path:
    """Where in the hub's cache the files of a tokenizer are, fetched if need be. Raises an error if there are none.

    The hub is asked once: without a network, transformers asks for minutes.
    """
    cached = try_to_load_from_cache(name, "tokenizer_config.json")
    if isinstance(cached, str) and len(read_own_files(Path(cached).parent)) > 1:
        return Path(cached).parent
    HfApi().model_info(name, timeout=10)
    return Path(snapshot_download(name, allow_patterns=[*PATTERNS, MODEL_CONFIG], etag_timeout=10))


def _rewrite_for_all_versions(directory: Path) -> None:
    """transformers 5 writes a class and a list that 4 does not know; it reads their older names as well."""
    file = directory / "tokenizer_config.json"
    if not file.is_file():
        return
    settings = json.loads(file.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
