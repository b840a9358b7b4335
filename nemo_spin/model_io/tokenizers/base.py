"""What all tokenizers have in common."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nemo_spin.errors import CheckpointError, DataError, one_line
from nemo_spin.model_io.tokenizers.description import OVERRIDE_HINT, TokenizerDescription


class NeMoTokenizer:
    """One of NeMo's tokenizers. See `nemo_spin.data.tokenizer.TextTokenizer` for what its members mean.

    Beside each method that raises NotImplementedError, a subclass sets `packages`: the distributions whose versions
    may change what it gives.
    """

    packages: tuple[str, ...] = ()

    def __init__(self, tokenizer: Any, description: TokenizerDescription, files: Mapping[str, bytes]) -> None:
        """tokenizer: NeMo's. files: name -> content of all files that it was made of."""
        self._tokenizer = tokenizer
        self._description = description
        self._files = dict(files)
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
        self.space_sensitive: bool = self._space_sensitive()

    @property
    def library(self) -> str:
        """ "huggingface", "sentencepiece" or "tiktoken"."""
        return self._description.library

    @cached_property
    def fingerprint(self) -> str:
        """Made of the tokenizer's files, of what its description adds to them, and of the versions of its library."""
        description = self._description
        parts = [
            description.library,
            description.legacy,
            description.special_tokens,
            description.chat_template,
            description.use_fast,
            [(package, version(package)) for package in self.packages],
            [hashlib.sha256(content).hexdigest() for _, content in sorted(self._files.items())],
        ]
        if description.options:
            parts.append(description.options)
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def render_chat(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        """The conversation as text, after the tokenizer's chat template; DataError where there is none, or it fails."""
        if not self._has_chat_template():
            raise DataError(
                f"The tokenizer of {self._description.origin} has no chat template, so messages cannot be rendered: "
                "use input/output data with a prompt_template, or a tokenizer with a chat template "
                "(model.tokenizer.type)."
            )
        try:
            return self._apply_chat_template(messages, add_generation_prompt)
        except Exception as error:
            raise DataError(f"The tokenizer's chat template refuses the messages: {one_line(error)}.") from None

    def encode(self, text: str) -> list[int]:
        """Token ids of the text; no special tokens are added."""
        raise NotImplementedError

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included where the tokenizer has text for them."""
        raise NotImplementedError

    def id_of(self, token: str) -> int | None:
        """The id when the whole string is one token of the vocabulary, else None."""
        raise NotImplementedError

    def save(self, directory: Path) -> dict[str, Any]:
        """Write the tokenizer's files into the directory of a `.nemo`; returns its `tokenizer` node."""
        raise NotImplementedError

    def save_nemo2(self, directory: Path) -> dict[str, Any]:
        """Write the tokenizer's files into the context/ directory of a NeMo 2 checkpoint.

        Returns the `tokenizer` node of its model.yaml, which `description.from_nemo2` reads.
        """
        raise NotImplementedError

    def save_huggingface(self, directory: Path) -> str | None:
        """Write what a Hugging Face directory needs for transformers to tokenize as this does.

        Returns None, or a sentence on what was written instead where transformers has no tokenizer that does.
        """
        raise NotImplementedError

    def _special_id(self, role: str) -> int | None:
        """role: "bos", "eos" or "pad"."""
        raise NotImplementedError

    def _vocab_size(self) -> int:
        return int(self._tokenizer.vocab_size)

    def _space_sensitive(self) -> bool:
        return bool(self._tokenizer.space_sensitive)

    def _has_chat_template(self) -> bool:
        return False

    def _apply_chat_template(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        raise NotImplementedError
