"""Tokenizers of sentencepiece."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_spin.errors import CheckpointError, one_line
from nemo_spin.model_io.tokenizers.base import NeMoTokenizer
from nemo_spin.model_io.tokenizers.comparison import write_and_compare
from nemo_spin.model_io.tokenizers.conversion import from_sentencepiece
from nemo_spin.model_io.tokenizers.description import TokenizerDescription

_NEMO2_TARGET = "nemo.collections.common.tokenizers.sentencepiece_tokenizer.SentencePieceTokenizer"
_MODEL = "tokenizer.model"


class SentencePieceTokenizer(NeMoTokenizer):
    packages = ("sentencepiece",)

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.text_to_ids(text))

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.ids_to_text(list(ids))

    def id_of(self, token: str) -> int | None:
        found = self._tokenizer.token_to_id(token)
        return None if found == self._tokenizer.unk_id else int(found)

    def save(self, directory: Path) -> dict[str, Any]:
        name = f"{hashlib.md5(self._model(), usedforsecurity=False).hexdigest()}_tokenizer.model"
        self._write_model(directory / name)
        node: dict[str, Any] = {"library": "sentencepiece", "type": None, "model": f"nemo:{name}"}
        if self._description.special_tokens:
            node["special_tokens"] = self._description.special_tokens
        return node | {"sentencepiece_legacy": self._description.legacy}

    def save_nemo2(self, directory: Path) -> dict[str, Any]:
        self._write_model(directory / _MODEL)
        return {
            "_target_": _NEMO2_TARGET,
            "model_path": _MODEL,
            "legacy": self._description.legacy,
            "special_tokens": self._description.special_tokens or None,
        }

    def save_huggingface(self, directory: Path) -> str | None:
        self._write_model(directory / _MODEL)
        processor = self._tokenizer.tokenizer
        roles = {
            f"{role}_token": processor.id_to_piece(found)
            for role in ("bos", "eos", "unk")
            if (found := getattr(processor, f"{role}_id")()) >= 0
        }
        added = self._tokenizer.id_to_special_token
        problem = write_and_compare(
            self,
            lambda: from_sentencepiece(self._model(), added),
            roles,
            directory,
            [f"one {token} two{token}three" for token in added.values()],
        )
        if problem is None:
            return None
        return (
            f"{directory / _MODEL} is the model of sentencepiece, and there are no other tokenizer files: "
            f"transformers' tokenizers do not tokenize as it does ({problem})."
        )

    def _model(self) -> bytes:
        ((_, content),) = self._files.items()
        return content

    def _write_model(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(self._model())

    def _special_id(self, role: str) -> int | None:
        if hasattr(self._tokenizer, f"{role}_token"):
            found = getattr(self._tokenizer, f"{role}_id")
        else:
            # NeMo's legacy sentencepiece knows only the roles that were configured; the model may know more.
            found = getattr(self._tokenizer.tokenizer, f"{role}_id")()
        return None if found is None or found < 0 else int(found)


def build(description: TokenizerDescription, local: Path | None) -> SentencePieceTokenizer:
    """local: the model's file, None if it is not there. Raises CheckpointError."""
    if local is None or not local.is_file():
        raise CheckpointError(
            f"{description.origin} names the sentencepiece model {description.source}, which is not there: give the "
            "file as model.tokenizer.library=sentencepiece model.tokenizer.model=/path/to/tokenizer.model."
        )
    from nemo.collections.common.tokenizers import sentencepiece_tokenizer

    try:
        tokenizer = sentencepiece_tokenizer.SentencePieceTokenizer(
            os.fspath(local), special_tokens=description.special_tokens or None, legacy=description.legacy
        )
    except Exception as error:
        raise CheckpointError(
            f"The sentencepiece model {local.name} of {description.origin} cannot be loaded: {one_line(error)[:200]}."
        ) from None
    return SentencePieceTokenizer(tokenizer, description, {local.name: local.read_bytes()})
