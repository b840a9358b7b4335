"""Tokenizers of sentencepiece and tiktoken as a tokenizer.json, which every version of transformers reads.

transformers' own LlamaTokenizer does not give sentencepiece's ids for every model, and other ones in each version: here
all that the model file says is carried over. `comparison.write_and_compare` shows whether it was enough.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

_SPACE = "▁"  # how sentencepiece writes a space


def write_files(tokenizer: Tokenizer, roles: Mapping[str, str], directory: Path) -> None:
    """tokenizer.json and tokenizer_config.json.

    roles: "bos_token", ... -> token. No special token is added to a text: prompts are rendered with theirs.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **roles}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def from_sentencepiece(content: bytes, added: Mapping[int, str]) -> Tokenizer:
    """content: the model file. added: id -> token, of tokens beside the model (NeMo's legacy mode)."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(content)
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    byte_fallback = proto.trainer_spec.byte_fallback
    if proto.trainer_spec.model_type == proto.trainer_spec.UNIGRAM:
        model = models.Unigram(pieces, unk_id=proto.trainer_spec.unk_id, byte_fallback=byte_fallback)
    else:
        vocab = {piece: index for index, (piece, _) in enumerate(pieces)}
        model = models.BPE(
            vocab,
            _merges({piece: -score for piece, score in pieces}),
            unk_token=pieces[proto.trainer_spec.unk_id][0],
            fuse_unk=True,
            byte_fallback=byte_fallback,
        )
    tokenizer = Tokenizer(model)
    spec = proto.normalizer_spec
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    beginning = [decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *beginning]
    )
    kinds = proto.SentencePiece
    tokenizer.add_special_tokens(
        [_whole(piece.piece, True) for piece in proto.pieces if piece.type in (kinds.CONTROL, kinds.UNKNOWN)]
    )
    tokenizer.add_tokens([_whole(piece.piece, False) for piece in proto.pieces if piece.type == kinds.USER_DEFINED])
    tokenizer.add_special_tokens([_whole(token, True) for _, token in sorted(added.items())])
    return tokenizer


def from_tiktoken(ranks: Mapping[bytes, int], special_tokens: Sequence[str], pattern: str) -> Tokenizer:
    """ranks: token -> its rank. special_tokens: those with the first ids, before rank 0.

    pattern: the regular expression that splits a text into words.
    """
    letters = _byte_letters()
    written = {"".join(letters[byte] for byte in token): rank for token, rank in ranks.items()}
    vocab = {token: index for index, token in enumerate(special_tokens)}
    vocab |= {token: rank + len(special_tokens) for token, rank in written.items()}
    tokenizer = Tokenizer(models.BPE(vocab, _merges(written), ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([_whole(token, True) for token in special_tokens])
    return tokenizer


def _whole(token: str, special: bool) -> AddedToken:
    return AddedToken(token, special=special, normalized=False)


def _merges(order: Mapping[str, float]) -> list[tuple[str, str]]:
    """All pairs of tokens that make a token, in the order in which they are merged.

    order: token -> a number, smaller for what is merged first.
    """
    found = []
    for token, place in order.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in order and right in order:
                found.append((place, order[left], order[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _byte_letters() -> dict[int, str]:
    """The printable character that byte-level tokenizers write for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in printable)
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(others)}
