"""The tokenizer of a Megatron-LM or Megatron-Bridge checkpoint, which describe it with the same fields.

Megatron-Bridge puts the tokenizer's files into `tokenizer/` beside the weights. What lies there is preferred to the
path that the configuration names, which is one of the machine that wrote it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_spin.model_io.tokenizers.description import TokenizerDescription

FILES = "tokenizer"
_HUGGINGFACE = ("HuggingFaceTokenizer", "SFTTokenizer")
_SENTENCEPIECE = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
# Type -> name of its file in tokenizer/.
_FILE_OF = {**dict.fromkeys(_SENTENCEPIECE, "tokenizer.model"), "TikTokenizer": "tokenizer.json"}
_NO_TOKENIZER = ("NullTokenizer", "NullMultimodalTokenizer")


def from_megatron(config: Mapping[str, Any] | None, iteration: Path, origin: str) -> TokenizerDescription | None:
    """From `args`, or the `tokenizer` section of a run_config.yaml; None where they describe none.

    iteration: the directory of the weights, in which relative paths are looked up. origin: names the checkpoint.
    """
    kind = (config or {}).get("tokenizer_type")
    if not isinstance(kind, str) or kind in _NO_TOKENIZER:
        return None
    named = _text(config.get("tokenizer_model"))
    source = _beside(kind, iteration, named) or named
    if kind in _HUGGINGFACE:
        keywords = config.get("hf_tokenizer_kwargs") or {}
        return TokenizerDescription(
            library="huggingface",
            source=source,
            origin=origin,
            chat_template=_text(config.get("chat_template")),
            use_fast=bool(keywords.get("use_fast", not config.get("tokenizer_hf_no_use_fast"))),
        )
    if kind in _SENTENCEPIECE:
        keywords = config.get("sp_tokenizer_kwargs") or {}
        return TokenizerDescription(
            library="sentencepiece",
            source=source,
            origin=origin,
            legacy=bool(keywords.get("legacy", config.get("tokenizer_sentencepiece_legacy"))),
        )
    return TokenizerDescription("tiktoken" if kind == "TikTokenizer" else kind, source, origin)


def to_megatron(library: str, source: str) -> dict[str, Any]:
    """Fields of Megatron-LM's args and Megatron-Bridge's TokenizerConfig.

    library: "huggingface", "sentencepiece" or "tiktoken". source: a directory or a file, absolute: neither reader looks
    up relative ones in the checkpoint.
    """
    kinds = {
        "huggingface": "HuggingFaceTokenizer",
        "sentencepiece": "SentencePieceTokenizer",
        "tiktoken": "TikTokenizer",
    }
    return {"tokenizer_type": kinds[library], "tokenizer_model": source}


def _beside(kind: str, iteration: Path, named: str | None) -> str | None:
    if kind in _HUGGINGFACE:
        return FILES if (iteration / FILES / "tokenizer_config.json").is_file() else None
    if kind not in _FILE_OF:
        return None
    places = [f"{FILES}/{name}" for name in (Path(named or "").name, _FILE_OF[kind]) if name]
    return next((place for place in places if (iteration / place).is_file()), None)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
