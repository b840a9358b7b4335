"""Tokenizers for the tests of the data floor: a character-level one, and real ones where checkpoints are at hand."""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from transformers import PreTrainedTokenizerFast

from nemo_spin.errors import DataError

SPECIALS = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|end|>", "<b>"]
SPECIALS += ["<extra_id_0>", "<extra_id_1>", "<extra_id_2>"]
Render = Callable[[list[dict], bool], str]


def chatml(messages: list[dict], add_generation_prompt: bool) -> str:
    turns = [f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages]
    return "".join(turns) + ("<|im_start|>assistant\n" if add_generation_prompt else "")


class CharTokenizer:
    """One token per character below 1000, after the special tokens. Ids tell the text back exactly."""

    eos_id, bos_id, pad_id = 2, 1, 3
    vocab_size = len(SPECIALS) + 1000
    fingerprint = "characters"

    def __init__(self, space_sensitive: bool = True, render: Render | None = chatml) -> None:
        self.space_sensitive = space_sensitive
        self.render = render
        self.encoded: list[str] = []

    def encode(self, text: str) -> list[int]:
        self.encoded.append(text)
        pieces = re.split("(" + "|".join(map(re.escape, SPECIALS)) + ")", text)
        ids = []
        for piece in pieces:
            ids += [SPECIALS.index(piece)] if piece in SPECIALS else [len(SPECIALS) + ord(c) % 1000 for c in piece]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(SPECIALS[i] if i < len(SPECIALS) else chr(i - len(SPECIALS)) for i in ids)

    def render_chat(self, messages: list[dict], add_generation_prompt: bool) -> str:
        if self.render is None:
            raise DataError("the tokenizer has no chat template: give it one")
        return self.render(messages, add_generation_prompt)

    def id_of(self, token: str) -> int | None:
        return SPECIALS.index(token) if token in SPECIALS else None


@pytest.fixture
def make_tokenizer() -> type[CharTokenizer]:
    return CharTokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where tokenized data go: a place of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "nemo_spin"


@pytest.fixture
def tokenizer() -> CharTokenizer:
    return CharTokenizer()


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write lines of text or bytes to a JSONL file."""

    def to_file(*lines: str | bytes) -> Path:
        path = tmp_path / "data.jsonl"
        path.write_bytes(b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines))
        return path

    return to_file


@pytest.fixture(scope="session")
def checkpoints() -> Path:
    """Genuine NeMo checkpoints: NEMO_SPIN_CHECKPOINTS, or shared/checkpoints in or beside the repository."""
    root = Path(__file__).resolve().parents[3]
    places = [
        Path(os.environ.get("NEMO_SPIN_CHECKPOINTS", "")),
        *(up / "shared/checkpoints" for up in (root, root.parent)),
    ]
    for place in places:
        if (place / "nemo1_llama_sp.nemo").is_file():
            return place
    pytest.skip("no NeMo checkpoints at hand")


class SentencePiece:
    space_sensitive = False
    fingerprint = "sentencepiece"

    def __init__(self, model: Any) -> None:
        self.model = model
        self.vocab_size, self.eos_id, self.bos_id = (
            self.model.vocab_size(),
            self.model.eos_id(),
            self.model.bos_id(),
        )
        self.pad_id = self.eos_id

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self.model.decode(list(ids))

    def render_chat(self, messages: list[dict], add_generation_prompt: bool) -> str:
        raise DataError("the tokenizer has no chat template: use prompt_template")

    def id_of(self, token: str) -> int | None:
        token_id = self.model.piece_to_id(token)
        return None if token_id == self.model.unk_id() else token_id


class HuggingFace:
    space_sensitive = True
    fingerprint = "huggingface"

    def __init__(self, model: PreTrainedTokenizerFast) -> None:
        self.model = model
        self.vocab_size, self.eos_id, self.bos_id = len(self.model), self.model.eos_token_id, self.model.bos_token_id
        self.pad_id = self.model.pad_token_id

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        return self.model.decode(ids)

    def render_chat(self, messages: list[dict], add_generation_prompt: bool) -> str:
        return self.model.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)

    def id_of(self, token: str) -> int | None:
        return self.model.get_vocab().get(token)


@pytest.fixture(scope="session")
def sentencepiece_tokenizer(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> SentencePiece:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    with tarfile.open(checkpoints / "nemo1_llama_sp.nemo") as archive:
        member = next(name for name in archive.getnames() if name.endswith("tokenizer.model"))
        path.write_bytes(archive.extractfile(member).read())
    return SentencePiece(sentencepiece.SentencePieceProcessor(model_file=str(path)))


@pytest.fixture(scope="session")
def huggingface_tokenizer(checkpoints: Path) -> HuggingFace:
    model = PreTrainedTokenizerFast.from_pretrained(checkpoints / "nemo2_llama/context/nemo_tokenizer")
    model.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    return HuggingFace(model)


CORPUS = [
    "system user assistant: Hello, how are you? One two three four five.",
    "é ünïcode \n\n lines\n and <tags>",
] * 50
CHAT_SPECIALS = ["</s>", "<|im_start|>", "<|im_end|>", "<extra_id_0>", "<extra_id_1>", "<extra_id_2>"]


@pytest.fixture(scope="session")
def bpe_model() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="</s>", pad_token="</s>")
    fast.add_special_tokens({"additional_special_tokens": CHAT_SPECIALS[1:]})
    return fast


@pytest.fixture(scope="session")
def bpe_tokenizer(bpe_model: PreTrainedTokenizerFast) -> HuggingFace:
    return HuggingFace(bpe_model)


@pytest.fixture(scope="session", params=["nmt_nfkc", "identity"])
def trained_sentencepiece(request: pytest.FixtureRequest) -> SentencePiece:
    """Sentencepiece models with NeMo's chat tokens: one folds line breaks into spaces, the other keeps them."""
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=trained,
        vocab_size=400,
        model_type="bpe",
        hard_vocab_limit=False,
        byte_fallback=True,
        user_defined_symbols=CHAT_SPECIALS[3:],
        normalization_rule_name=request.param,
        remove_extra_whitespaces=request.param != "identity",
        minloglevel=2,
    )
    return SentencePiece(sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue()))


@pytest.fixture
def huggingface_less_bpe(bpe_tokenizer: HuggingFace) -> HuggingFace:
    """The byte-level tokenizer without NeMo's chat tokens."""
    plain = PreTrainedTokenizerFast(tokenizer_object=bpe_tokenizer.model.backend_tokenizer, eos_token="</s>")
    without = HuggingFace(plain)
    without.id_of = lambda token: None  # type: ignore[method-assign]
    return without
