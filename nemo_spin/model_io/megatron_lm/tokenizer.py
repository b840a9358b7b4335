"""The tokenizer of a Megatron-LM or Megatron-Bridge checkpoint, which describe it with the same fields.

Megatron-Bridge puts the tokenizer's files into `tokenizer/` beside the weights. What lies there is preferred to the
path that the configuration names, which is one of the machine that wrote it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemo_spin.model_io.tokenizers.description import TokenizerDescription

FILES = "tokenizer"
# Type -> library. The first one of a library is written.
_LIBRARIES = {
    "HuggingFaceTokenizer": "huggingface",
    "SFTTokenizer": "huggingface",
    "SentencePieceTokenizer": "sentencepiece",
    "GPTSentencePieceTokenizer": "sentencepiece",
    "Llama2Tokenizer": "sentencepiece",
    "TikTokenizer": "tiktoken",
}
# Library -> name of its file in tokenizer/.
_FILE_OF = {"sentencepiece": "tokenizer.model", "tiktoken": "tokenizer.json"}
_NO_TOKENIZER = ("NullTokenizer", "NullMultimodalTokenizer")


def from_megatron(config: Mapping[str, Any] | None, iteration: Path, origin: str) -> TokenizerDescription | None:
    """From `args`, or the `tokenizer` section of a run_config.yaml; None where they describe none.

    iteration: the directory of the weights, in which relative paths are looked up. origin: names the checkpoint.
    """
    kind = (config or {}).get("tokenizer_type")
    if not isinstance(kind, str) or kind in _NO_TOKENIZER:
        return None
    # A type that is not known is refused when the tokenizer is built.
    library = _LIBRARIES.get(kind, kind)
    named = _text(config.get("tokenizer_model"))
    description = TokenizerDescription(library, _beside(library, iteration, named) or named, origin)
    if library == "huggingface":
        keywords = config.get("hf_tokenizer_kwargs") or {}
        use_fast = bool(keywords.get("use_fast", not config.get("tokenizer_hf_no_use_fast")))
        return replace(description, chat_template=_text(config.get("chat_template")), use_fast=use_fast)
    if library == "sentencepiece":
        keywords = config.get("sp_tokenizer_kwargs") or {}
        return replace(description, legacy=bool(keywords.get("legacy", config.get("tokenizer_sentencepiece_legacy"))))
    return description


def to_megatron(library: str, source: str) -> dict[str, Any]:
    """Fields of Megatron-LM's args and Megatron-Bridge's TokenizerConfig.

    library: "huggingface", "sentencepiece" or "tiktoken". source: a directory or a file, absolute: neither reader looks
    up relative ones in the checkpoint.
    """
    kind = next(kind for kind, of in _LIBRARIES.items() if of == library)
    return {"tokenizer_type": kind, "tokenizer_model": source}


def _beside(library: str, iteration: Path, named: str | None) -> str | None:
    if library == "huggingface":
        return FILES if (iteration / FILES / "tokenizer_config.json").is_file() else None
    if library not in _FILE_OF:
        return None
    places = [f"{FILES}/{name}" for name in (Path(named or "").name, _FILE_OF[library]) if name]
    return next((place for place in places if (iteration / place).is_file()), None)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
