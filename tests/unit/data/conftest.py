"""Tokenizers for the tests of the data floor: a character-level one, and real ones where checkpoints are at hand."""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from nemo_spin.errors import DataError

SPECIALS = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|end|>", "<b>"]
Render = Callable[[list[dict], bool], str]


def chatml(messages: list[dict], add_generation_prompt: bool) -> str:
    turns = [f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages]
    return "".join(turns) + ("<|im_start|>assistant\n" if add_generation_prompt else "")


class CharTokenizer:
    """One token per character below 1000, after the special tokens. Ids tell the text back exactly."""

    eos_id, bos_id, pad_id = 2, 1, 3
    vocab_size = len(SPECIALS) + 1000

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

    def __init__(self, path: Path) -> None:
        sentencepiece = pytest.importorskip("sentencepiece")
        self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
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

    def __init__(self, path: Path) -> None:
        transformers = pytest.importorskip("transformers")
        self.model = transformers.PreTrainedTokenizerFast.from_pretrained(path)
        self.model.chat_template = (
            "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token + '\n' }}{% endfor %}"
            "{% if add_generation_prompt %}assistant:{% endif %}"
        )
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
    return SentencePiece(path)


@pytest.fixture(scope="session")
def huggingface_tokenizer(checkpoints: Path) -> HuggingFace:
    return HuggingFace(checkpoints / "nemo2_llama/context/nemo_tokenizer")
