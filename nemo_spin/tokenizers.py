"""The tokenizer of a checkpoint: NeMo's Hugging Face and sentencepiece tokenizers behind one small interface.

NeMo is imported when a tokenizer is built: it takes seconds, and configurations are checked before.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nemo_spin.checkpoint.tokenizer_description import OVERRIDE_HINT, TokenizerDescription
from nemo_spin.errors import CheckpointError, DataError

# What a Hugging Face tokenizer may consist of; other files beside it (weights, model cards) are not its own.
_TOKENIZER_FILES = (
    "tokenizer*.json",
    "tokenizer*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "spiece.model",
    "sentencepiece*.model",
)


class NeMoTokenizer:
    """One of NeMo's tokenizers. See `nemo_spin.data.tokenizer.TextTokenizer` for what its members mean."""

    def __init__(self, tokenizer: Any, description: TokenizerDescription, files: Mapping[str, bytes]) -> None:
        """tokenizer: NeMo's. files: name -> content of all files that it was made of."""
        self._tokenizer = tokenizer
        self._description = description
        self._files = dict(files)
        self._is_huggingface = description.library == "huggingface"
        eos_id = self._special_id("eos")
        if eos_id is None:
            raise CheckpointError(
                f"The tokenizer of {description.origin} has no end-of-sequence token, without which no response ends: "
                f"{OVERRIDE_HINT}."
            )
        self.vocab_size: int = self._vocab_size()
        self.eos_id: int = eos_id
        self.bos_id: int | None = self._special_id("bos")
        pad_id = self._special_id("pad")
        self.pad_id: int = eos_id if pad_id is None else pad_id
        self.space_sensitive: bool = bool(tokenizer.space_sensitive)

    def _vocab_size(self) -> int:
        if self._is_huggingface:
            return max(len(self._tokenizer.tokenizer), 1 + max(self._tokenizer.tokenizer.get_vocab().values()))
        return int(self._tokenizer.vocab_size)

    def _special_id(self, role: str) -> int | None:
        if self._is_huggingface or hasattr(self._tokenizer, f"{role}_token"):
            found = getattr(self._tokenizer, f"{role}_id")
        else:
            # NeMo's legacy sentencepiece knows only the roles that were configured; the model may know more.
            found = getattr(self._tokenizer.tokenizer, f"{role}_id")()
        return None if found is None or found < 0 else int(found)

    @cached_property
    def fingerprint(self) -> str:
        """Made of the tokenizer's files, of what its description adds to them, and of the versions of its library."""
        description = self._description
        packages = ("transformers", "tokenizers") if self._is_huggingface else ("sentencepiece",)
        parts = [
            description.library,
            description.legacy,
            description.special_tokens,
            description.chat_template,
            description.use_fast,
            [(package, version(package)) for package in packages],
            [hashlib.sha256(content).hexdigest() for _, content in sorted(self._files.items())],
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of the text; no special tokens are added."""
        if self._is_huggingface:
            return list(self._tokenizer.tokenizer.encode(text, add_special_tokens=False))
        return list(self._tokenizer.text_to_ids(text))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included where the tokenizer has text for them."""
        if self._is_huggingface:
            return self._tokenizer.tokenizer.decode(list(ids), skip_special_tokens=False)
        return self._tokenizer.ids_to_text(list(ids))

    def render_chat(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        """The conversation as text, after the tokenizer's chat template; DataError where there is none, or it fails."""
        if not self._is_huggingface or not self._tokenizer.tokenizer.chat_template:
            raise DataError(
                f"The tokenizer of {self._description.origin} has no chat template, so messages cannot be rendered: "
                "use input/output data with a prompt_template, or a tokenizer with a chat template "
                "(model.tokenizer.type)."
            )
        try:
            return self._tokenizer.tokenizer.apply_chat_template(
                messages, add_generation_prompt=add_generation_prompt, tokenize=False
            )
        except Exception as error:
            raise DataError(f"The tokenizer's chat template refuses the messages: {_one_line(error)}.") from None

    def id_of(self, token: str) -> int | None:
        """The id when the whole string is one token of the vocabulary, else None."""
        if self._is_huggingface:
            return self._tokenizer.tokenizer.get_vocab().get(token)
        found = self._tokenizer.token_to_id(token)
        return None if found == self._tokenizer.unk_id else int(found)

    def save(self, directory: Path) -> dict[str, Any]:
        """Write the tokenizer's files into the directory of a `.nemo`; returns its `tokenizer` node."""
        node: dict[str, Any] = {"library": self._description.library, "model": None, "type": None}
        if self._description.special_tokens:
            node["special_tokens"] = self._description.special_tokens
        if self._is_huggingface:
            target = directory / "tokenizer"
            target.mkdir(parents=True, exist_ok=True)
            for name, content in self._files.items():
                (target / name).write_bytes(content)
            node |= {"type": "nemo:tokenizer", "use_fast": self._description.use_fast}
            if self._description.chat_template:
                node["chat_template"] = self._description.chat_template
            return node
        directory.mkdir(parents=True, exist_ok=True)
        ((_, content),) = self._files.items()
        name = f"{hashlib.md5(content, usedforsecurity=False).hexdigest()}_tokenizer.model"
        (directory / name).write_bytes(content)
        return node | {"model": f"nemo:{name}", "sentencepiece_legacy": self._description.legacy}


def build_tokenizer(description: TokenizerDescription | None, base_dir: str | Path | None = None) -> NeMoTokenizer:
    """The tokenizer that a checkpoint's configuration, or an override of it, describes.

    base_dir: where the checkpoint's files are (`CheckpointSource.files_dir`); None for an override. The files are not
    needed any more when this returns. Code that comes with a tokenizer is never run. Raises CheckpointError, in one
    sentence that says what to give instead, if the tokenizer is not at hand or of another kind.
    """
    if description is None:
        raise CheckpointError(f"The checkpoint does not say which tokenizer it was trained with: {OVERRIDE_HINT}.")
    if description.library == "huggingface":
        return _huggingface(description, base_dir)
    if description.library == "sentencepiece":
        return _sentencepiece(description, base_dir)
    raise CheckpointError(
        f"{description.origin} asks for a tokenizer of the kind {description.library}, which is not supported: "
        f"{OVERRIDE_HINT}."
    )


def check_tokenizer_fits(tokenizer: Any, vocab_rows: int, origin: str) -> None:
    """Raises CheckpointError if the tokenizer makes ids beyond the embedding's rows.

    tokenizer: anything with `vocab_size`. origin: names the checkpoint in the message.
    """
    if tokenizer.vocab_size > vocab_rows:
        raise CheckpointError(
            f"The tokenizer has {tokenizer.vocab_size} ids, but the embedding of {origin} has {vocab_rows} rows: it is "
            "not this model's tokenizer; set model.tokenizer to the one that the model was trained with."
        )


def _local(description: TokenizerDescription, base_dir: str | Path | None) -> Path | None:
    """The file or directory that the description names, if it is on this machine."""
    source = (description.source or "").removeprefix("nemo:")
    if not source:
        return None
    in_checkpoint = [Path(base_dir) / source, Path(base_dir) / Path(source).name] if base_dir else []
    elsewhere = [] if (description.source or "").startswith("nemo:") else [Path(source).expanduser()]
    return next((path for path in [*in_checkpoint, *elsewhere] if path.exists()), None)


def _huggingface(description: TokenizerDescription, base_dir: str | Path | None) -> NeMoTokenizer:
    local = _local(description, base_dir)
    source = str(local or description.source or "")
    if local is None and (not source or source.startswith(("nemo:", "/", ".", "~"))):
        raise CheckpointError(
            f"{description.origin} names the tokenizer {description.source}, which is not there: {OVERRIDE_HINT}."
        )
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer

    special_tokens = description.special_tokens
    if isinstance(special_tokens, list):
        special_tokens = {"additional_special_tokens": special_tokens}
    try:
        tokenizer = AutoTokenizer(
            source,
            use_fast=description.use_fast,
            trust_remote_code=False,
            chat_template=description.chat_template,
            **special_tokens,
        )
    except Exception as error:
        only_named = "" if local else ", which is given by name only and is not in the local cache,"
        raise CheckpointError(
            f"The Hugging Face tokenizer {source} of {description.origin}{only_named} cannot be loaded "
            f"({_one_line(error)[:200]}): {OVERRIDE_HINT}."
        ) from None
    return NeMoTokenizer(tokenizer, description, _huggingface_files(tokenizer, local))


def _huggingface_files(tokenizer: Any, local: Path | None) -> dict[str, bytes]:
    if local is not None and local.is_dir():
        found = {path for pattern in _TOKENIZER_FILES for path in local.glob(pattern) if path.is_file()}
        return {path.name: path.read_bytes() for path in sorted(found)}
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        return {path.name: path.read_bytes() for path in sorted(Path(directory).iterdir()) if path.is_file()}


def _sentencepiece(description: TokenizerDescription, base_dir: str | Path | None) -> NeMoTokenizer:
    local = _local(description, base_dir)
    if local is None or not local.is_file():
        raise CheckpointError(
            f"{description.origin} names the sentencepiece model {description.source}, which is not there: give the "
            "file as model.tokenizer.library=sentencepiece model.tokenizer.model=/path/to/tokenizer.model."
        )
    from nemo.collections.common.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

    try:
        tokenizer = SentencePieceTokenizer(
            os.fspath(local), special_tokens=description.special_tokens or None, legacy=description.legacy
        )
    except Exception as error:
        raise CheckpointError(
            f"The sentencepiece model {local.name} of {description.origin} cannot be loaded: {_one_line(error)[:200]}."
        ) from None
    return NeMoTokenizer(tokenizer, description, {local.name: local.read_bytes()})


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
