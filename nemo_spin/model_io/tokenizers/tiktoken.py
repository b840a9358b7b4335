"""NeMo's tiktoken tokenizers: a vocabulary file of tiktoken, with special tokens before its ids."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nemo_spin.errors import CheckpointError, one_line
from nemo_spin.model_io.tokenizers.base import NeMoTokenizer
from nemo_spin.model_io.tokenizers.comparison import write_and_compare
from nemo_spin.model_io.tokenizers.conversion import from_tiktoken
from nemo_spin.model_io.tokenizers.description import TokenizerDescription

_NEMO2_TARGET = "nemo.collections.common.tokenizers.tiktoken_tokenizer.TiktokenTokenizer"
_VOCAB = "tokenizer.vocab.json"
# NeMo's defaults: ids in all, of which so many special ones come first.
_VOCAB_SIZE, _NUM_SPECIAL_TOKENS = 2**17, 1000


class TiktokenTokenizer(NeMoTokenizer):
    packages = ("tiktoken",)

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.text_to_ids(text))

    def decode(self, ids: Sequence[int]) -> str:
        # NeMo's ids_to_text decodes token by token, which breaks characters of several tokens, and drops special ones.
        return "".join(self._pieces(ids))

    def id_of(self, token: str) -> int | None:
        try:
            return int(self._tokenizer.token_to_id(token))
        except KeyError:
            return None

    def save(self, directory: Path) -> dict[str, Any]:
        self._write_vocab(directory)
        return {"library": "tiktoken", "type": None, "model": None, "vocab_file": f"nemo:{_VOCAB}", **self._settings()}

    def save_nemo2(self, directory: Path) -> dict[str, Any]:
        self._write_vocab(directory)
        return {"_target_": _NEMO2_TARGET, "vocab_file": _VOCAB, **self._settings()}

    def save_huggingface(self, directory: Path) -> str | None:
        encoding, specials = self._tokenizer.tokenizer, self._tokenizer.special_tokens
        roles = {
            f"{role}_token": specials[getattr(self._tokenizer, f"{role}_id")] for role in ("bos", "eos", "pad", "unk")
        }
        problem = write_and_compare(
            self,
            lambda: from_tiktoken(self._tokenizer.token2id, specials, encoding._pat_str),
            roles,
            directory,
        )
        if problem is None:
            return None
        self._write_vocab(directory)
        return (
            f"{directory / _VOCAB} is the vocabulary of NeMo's tiktoken tokenizer, and there are no other tokenizer "
            f"files: transformers' tokenizers do not tokenize as it does ({problem})."
        )

    def _settings(self) -> dict[str, Any]:
        named = dict(self._description.options)
        named.setdefault("vocab_size", self.vocab_size)
        named.setdefault("num_special_tokens", self._tokenizer.num_special_tokens)
        if self._description.special_tokens:
            named["special_tokens"] = self._description.special_tokens
        return named

    def _write_vocab(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        ((_, content),) = self._files.items()
        (directory / _VOCAB).write_bytes(content)

    def _pieces(self, ids: Sequence[int]) -> Iterator[str]:
        specials, regular = self._tokenizer.special_tokens, []
        for token in ids:
            if token < len(specials):
                yield self._tokenizer.tokenizer.decode(regular)
                regular = []
                yield specials[token]
            elif token < self.vocab_size:
                regular.append(token - len(specials))
        yield self._tokenizer.tokenizer.decode(regular)

    def _special_id(self, role: str) -> int | None:
        return int(getattr(self._tokenizer, f"{role}_id"))

    def _space_sensitive(self) -> bool:
        return self.encode("x y") != self.encode("x") + self.encode("y")


def build(description: TokenizerDescription, local: Path | None) -> TiktokenTokenizer:
    """local: the vocabulary's file, None if it is not there. Raises CheckpointError."""
    if description.options.get("encoding_name"):
        raise CheckpointError(
            f"{description.origin} asks for tiktoken's encoding {description.options['encoding_name']} by name, which "
            "is not supported: give a vocabulary file as model.tokenizer.library=tiktoken "
            "model.tokenizer.model=/path/to/vocab.json."
        )
    if local is None or not local.is_file():
        raise CheckpointError(
            f"{description.origin} names the tiktoken vocabulary {description.source}, which is not there: give the "
            "file as model.tokenizer.library=tiktoken model.tokenizer.model=/path/to/vocab.json."
        )
    if importlib.util.find_spec("tiktoken") is None:
        raise CheckpointError(
            f"The tokenizer of {description.origin} needs the package tiktoken, which is not installed: "
            "pip install 'nemo-spin[tiktoken]'."
        )
    from nemo.collections.common.tokenizers import tiktoken_tokenizer

    content = local.read_bytes()
    given = {key: value for key, value in description.options.items() if value is not None}
    try:
        # NeMo asks for as many tokens as vocab_size says; a smaller file without a vocab_size is taken whole.
        given.setdefault("num_special_tokens", _NUM_SPECIAL_TOKENS)
        given.setdefault("vocab_size", min(_VOCAB_SIZE, len(json.loads(content)) + given["num_special_tokens"]))
        special_tokens = list(description.special_tokens) or None
        with contextlib.redirect_stdout(io.StringIO()):  # it prints while it loads
            tokenizer = tiktoken_tokenizer.TiktokenTokenizer(os.fspath(local), special_tokens=special_tokens, **given)
    except Exception as error:
        reason = one_line(error)[:200] if str(error) else "it is no vocabulary as NeMo's tiktoken tokenizer reads it"
        raise CheckpointError(
            f"The tiktoken vocabulary {local.name} of {description.origin} cannot be loaded: {reason}."
        ) from None
    return TiktokenTokenizer(tokenizer, description, {local.name: content})
