"""Tokenizers made on the spot, as a checkpoint would describe them."""

from __future__ import annotations

import base64
import io
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nemo_spin.errors import CheckpointError, ConfigError, DataError
from nemo_spin.model_io.tokenizers import build_tokenizer, check_tokenizer_fits
from nemo_spin.model_io.tokenizers.build import local_path
from nemo_spin.model_io.tokenizers.description import (
    TokenizerDescription,
    from_huggingface,
    from_nemo1,
    from_nemo2,
    from_path,
    override,
    override_from_path,
)

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
AUTO = "nemo.collections.common.tokenizers.huggingface.auto_tokenizer.AutoTokenizer"


def write_huggingface(directory: Path, chat_template: str | None = TEMPLATE) -> Path:
    words = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", "one", "two", "three"])}
    model = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(directory)
    return directory


def write_sentencepiece(file: Path, text: str = "one two three four five six", **options: Any) -> Path:
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text] * 20),
        model_writer=trained,
        minloglevel=2,
        hard_vocab_limit=False,
        **{"vocab_size": 30} | options,
    )
    file.write_bytes(trained.getvalue())
    return file


def test_huggingface_from_a_nemo2_context(tmp_path: Path) -> None:
    write_huggingface(tmp_path / "nemo_tokenizer")
    (tmp_path / "nemo_tokenizer" / "model.safetensors").write_bytes(b"no tokenizer")
    description = from_nemo2(
        {"_target_": AUTO, "pretrained_model_name": "nemo_tokenizer", "additional_special_tokens": ["<new>"]}, "it"
    )
    tokenizer = build_tokenizer(description, [tmp_path])
    assert tokenizer.encode("one two </s> four") == [3, 4, 2, 0]
    assert tokenizer.decode([3, 2, 4]) == "one </s> two"
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (7, 1, 2, 2)
    assert (tokenizer.id_of("<new>"), tokenizer.id_of("three"), tokenizer.id_of("one two")) == (6, 5, None)
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.render_chat(messages, add_generation_prompt=True) == "<user>hi<assistant>"
    with pytest.raises(DataError, match="no tools"):
        tokenizer.render_chat([{"role": "tool", "content": "x"}], add_generation_prompt=False)
    check_tokenizer_fits(tokenizer, 7, "it")
    with pytest.raises(CheckpointError, match="7 ids, but the embedding of it has 6 rows"):
        check_tokenizer_fits(tokenizer, 6, "it")

    archive = tmp_path / "archive"
    node = tokenizer.save(archive)
    assert not (archive / "tokenizer" / "model.safetensors").exists()
    again = build_tokenizer(from_nemo1({"tokenizer": node}, "archive"), [archive])
    assert again.encode("one <new>") == tokenizer.encode("one <new>") == [3, 6]
    assert again.render_chat(messages, add_generation_prompt=False) == "<user>hi"


def test_sentencepiece_from_a_nemo1_archive(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path / "abc_tokenizer.model")
    node = {"library": "sentencepiece", "model": "nemo:abc_tokenizer.model", "sentencepiece_legacy": True}
    plain = build_tokenizer(from_nemo1({"tokenizer": node}, "it"), [tmp_path])
    assert plain.decode(plain.encode("one six")) == "one six"
    assert not plain.space_sensitive
    # Legacy mode knows no roles of its own: they are the model's.
    assert (plain.bos_id, plain.eos_id, plain.pad_id) == (1, 2, 2)
    assert (plain.id_of("</s>"), plain.id_of("no piece")) == (2, None)
    with pytest.raises(DataError, match="chat template"):
        plain.render_chat([], add_generation_prompt=True)

    added = build_tokenizer(from_nemo1({"tokenizer": node | {"special_tokens": ["<extra>"]}}, "it"), [tmp_path])
    assert added.vocab_size == plain.vocab_size + 1
    assert added.encode("one<extra>")[-1] == added.id_of("<extra>") == plain.vocab_size

    again_node = added.save(tmp_path / "archive")
    again = build_tokenizer(from_nemo1({"tokenizer": again_node}, "it"), [tmp_path / "archive"])
    assert again.encode("six<extra>one") == added.encode("six<extra>one")


def write_tiktoken(file: Path) -> Path:
    """Vocabulary of all bytes and some pairs; the last token is the first two bytes of a character of three."""
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [b"on", b"one", b" t", b" tw", b" two", "é".encode(), "日".encode()[:2]]
    rows = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": token.decode(errors="replace")}
        for rank, token in enumerate(tokens)
    ]
    file.write_text(json.dumps(rows))
    return file


def test_tiktoken_from_a_nemo1_archive(tmp_path: Path) -> None:
    pytest.importorskip("tiktoken")
    write_tiktoken(tmp_path / "abc_vocab.json")
    node = {"library": "tiktoken", "model": None, "vocab_file": "nemo:abc_vocab.json"}
    plain = build_tokenizer(from_nemo1({"tokenizer": node}, "it"), [tmp_path])
    assert (plain.vocab_size, plain.bos_id, plain.eos_id, plain.pad_id) == (1263, 1, 2, 4)
    assert plain.encode("one two") == [1257, 1260]
    text = "naïve 日本 one two</s>"
    assert plain.decode(plain.encode(text)) == text  # 日 is two tokens
    assert plain.decode([1, *plain.encode("one"), 2, 999, 5000]) == "<s>one</s><SPECIAL_999>"
    assert (plain.id_of("</s>"), plain.id_of("one"), plain.id_of("one two")) == (2, 1257, None)
    with pytest.raises(DataError, match="chat template"):
        plain.render_chat([], add_generation_prompt=True)

    special_tokens = ["<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>", "<extra>"]
    options = {"num_special_tokens": 10, "vocab_size": 266, "pattern": r"\s?\S+|\s+", "special_tokens": special_tokens}
    target = "nemo.collections.common.tokenizers.tiktoken_tokenizer.TiktokenTokenizer"
    chosen = from_nemo2({"_target_": target, "vocab_file": "abc_vocab.json"} | options, "it")
    small = build_tokenizer(chosen, [tmp_path])
    assert (small.vocab_size, small.id_of("<extra>"), small.id_of("<SPECIAL_8>")) == (266, 7, 8)
    assert small.decode(small.encode(text)) == text
    fewer = build_tokenizer(from_nemo1({"tokenizer": node | {"num_special_tokens": 20}}, "it"), [tmp_path])
    assert len({plain.fingerprint, small.fingerprint, fewer.fingerprint}) == 3

    for tokenizer in (plain, small):
        archive = tokenizer.save(tmp_path / "archive")
        context = tokenizer.save_nemo2(tmp_path / "context")
        for again in (
            build_tokenizer(from_nemo1({"tokenizer": archive}, "it"), [tmp_path / "archive"]),
            build_tokenizer(from_nemo2(context, "it"), [tmp_path / "context"]),
        ):
            assert again.encode(text) == tokenizer.encode(text)
            assert (again.vocab_size, again.id_of("<extra>")) == (tokenizer.vocab_size, tokenizer.id_of("<extra>"))
    by_model = override("tiktoken", None, str(tmp_path / "abc_vocab.json"))
    assert build_tokenizer(by_model).encode(text) == plain.encode(text)


def test_tiktoken_that_cannot_be_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vocab.json").write_text("{}")
    description = override("tiktoken", None, str(tmp_path / "vocab.json"))
    by_name = TokenizerDescription("tiktoken", None, "it", options={"encoding_name": "o200k_harmony"})
    with pytest.raises(CheckpointError, match="encoding o200k_harmony by name"):
        build_tokenizer(by_name)
    if find_spec("tiktoken"):
        with pytest.raises(CheckpointError, match=r"vocab\.json of model\.tokenizer\.model cannot be loaded"):
            build_tokenizer(description)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"pip install 'nemo-spin\[tiktoken\]'"):
        build_tokenizer(description)


TEXTS = ["one two three", " one", "two\n\nthree  four ", "x=12; naïve 日本 🙂", "two<extra>three <extra> one"]
LIKE_LLAMA = {
    "model_type": "bpe",
    "vocab_size": 320,
    "byte_fallback": True,
    "split_digits": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
}
NO_PREFIX = LIKE_LLAMA | {"add_dummy_prefix": False}


def in_transformers(directory: Path, text: str) -> list[int]:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory).encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    ("options", "extra"),
    [({}, []), ({}, ["<extra>"]), ({"model_type": "bpe"}, ["<extra>"]), (LIKE_LLAMA, []), (NO_PREFIX, [])],
)
def test_sentencepiece_in_other_checkpoints(tmp_path: Path, options: dict[str, Any], extra: list[str]) -> None:
    file = write_sentencepiece(tmp_path / "x.model", "one two three four 12; naïve  x = 3", **options)
    description = TokenizerDescription("sentencepiece", str(file), "it", legacy=bool(extra), special_tokens=extra)
    tokenizer = build_tokenizer(description)
    again = build_tokenizer(from_nemo2(tokenizer.save_nemo2(tmp_path / "context"), "it"), [tmp_path / "context"])
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]

    assert tokenizer.save_huggingface(tmp_path / "hf") is None
    assert (tmp_path / "hf" / "tokenizer.model").read_bytes() == file.read_bytes()
    assert [in_transformers(tmp_path / "hf", text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    theirs = build_tokenizer(from_huggingface(tmp_path / "hf"))
    assert (theirs.eos_id, theirs.bos_id, theirs.vocab_size) == (2, 1, tokenizer.vocab_size)
    for text in TEXTS[:2]:
        assert theirs.decode(tokenizer.encode(text)).split() == tokenizer.decode(tokenizer.encode(text)).split()


def test_what_transformers_tokenizes_otherwise_is_said(tmp_path: Path) -> None:
    # NeMo drops a lone space between special tokens; nothing in a tokenizer.json does.
    file = write_sentencepiece(tmp_path / "x.model", "one two three four 12; naïve  x = 3", **LIKE_LLAMA)
    description = TokenizerDescription("sentencepiece", str(file), "it", legacy=True, special_tokens=["<extra>"])
    sentence = build_tokenizer(description).save_huggingface(tmp_path / "hf")
    assert sentence is not None and "do not tokenize as it does (of '" in sentence
    assert [path.name for path in (tmp_path / "hf").iterdir()] == ["tokenizer.model"]


def test_tiktoken_in_a_huggingface_directory(tmp_path: Path) -> None:
    pytest.importorskip("tiktoken")
    tokenizer = build_tokenizer(override("tiktoken", None, str(write_tiktoken(tmp_path / "vocab.json"))))
    assert tokenizer.save_huggingface(tmp_path / "hf") is None
    assert [in_transformers(tmp_path / "hf", text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    theirs = build_tokenizer(from_huggingface(tmp_path / "hf"))
    assert (theirs.eos_id, theirs.bos_id, theirs.pad_id, theirs.vocab_size) == (2, 1, 4, tokenizer.vocab_size)
    assert theirs.decode(tokenizer.encode(TEXTS[3])) == TEXTS[3]


def test_huggingface_in_other_checkpoints(tmp_path: Path) -> None:
    plain = build_tokenizer(from_huggingface(write_huggingface(tmp_path / "theirs")))
    assert plain.save_huggingface(tmp_path / "copy") is None
    files = {path.name: path.read_bytes() for path in (tmp_path / "theirs").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "copy").iterdir()}

    messages = [{"role": "user", "content": "hi"}]
    added = {"pad_token": "<pad>", "additional_special_tokens": ["<new>"]}
    node = {"_target_": AUTO, "pretrained_model_name": "theirs", "chat_template": "{{ 'mine' }}"} | added
    changed = build_tokenizer(from_nemo2(node, "it"), [tmp_path])
    context = changed.save_nemo2(tmp_path / "context")
    assert changed.save_huggingface(tmp_path / "hf") is None
    settings = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    # transformers 4.48 knows neither TokenizersBackend nor a list of extra_special_tokens.
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["additional_special_tokens"] == ["<new>"] and "extra_special_tokens" not in settings
    of_nemo2 = json.loads((tmp_path / "context" / "nemo_tokenizer" / "tokenizer_config.json").read_text())
    assert of_nemo2["tokenizer_class"] == "PreTrainedTokenizerFast" and "extra_special_tokens" not in of_nemo2
    for again in (
        build_tokenizer(from_nemo2(context, "it"), [tmp_path / "context"]),
        build_tokenizer(from_huggingface(tmp_path / "hf")),
    ):
        assert again.encode("one <new> <pad>") == changed.encode("one <new> <pad>")
        assert (again.pad_id, again.eos_id, again.vocab_size) == (changed.pad_id, 2, changed.vocab_size)
        assert again.pad_id != plain.pad_id
        assert again.render_chat(messages, add_generation_prompt=False) == "mine"


def test_which_tokenizer_a_huggingface_directory_has(tmp_path: Path) -> None:
    assert from_huggingface(tmp_path) is None
    write_sentencepiece(tmp_path / "tokenizer.model")
    assert build_tokenizer(from_huggingface(tmp_path), [tmp_path]).library == "sentencepiece"
    write_huggingface(tmp_path)
    assert build_tokenizer(from_huggingface(tmp_path), [tmp_path]).encode("three") == [5]


def test_an_override_takes_local_files(tmp_path: Path) -> None:
    write_huggingface(tmp_path / "hf", chat_template=None)
    by_type = override(None, str(tmp_path / "hf"), None)
    assert build_tokenizer(by_type).encode("three") == [5]
    with pytest.raises(DataError, match="no chat template"):
        build_tokenizer(by_type).render_chat([], add_generation_prompt=True)
    by_model = override(None, None, str(write_sentencepiece(tmp_path / "x.model")))
    assert build_tokenizer(by_model).eos_id == 2
    assert override(None, None, None) is None
    with pytest.raises(ConfigError, match=r"model\.tokenizer\.type"):
        override("huggingface", None, None)
    with pytest.raises(ConfigError, match=r"tiktoken needs model\.tokenizer\.model"):
        override("tiktoken", "x", None)


@pytest.mark.parametrize(
    ("description", "words"),
    [
        (None, "model.tokenizer.type="),
        (TokenizerDescription("tiktoken", "x", "it"), "tiktoken"),
        (TokenizerDescription("megatron", "GPT2BPETokenizer", "it"), "megatron"),
        (TokenizerDescription("huggingface", None, "it"), "model.tokenizer.type="),
        (TokenizerDescription("huggingface", "/nowhere/at/all", "it"), "/nowhere/at/all, which is not there"),
        (TokenizerDescription("huggingface", "nobody/no-such-tokenizer", "it"), "by name only"),
        (TokenizerDescription("sentencepiece", "nemo:gone.model", "it"), "nemo:gone.model, which is not there"),
    ],
)
def test_tokenizers_that_are_not_at_hand(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, description: TokenizerDescription | None, words: str
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError) as error:
        build_tokenizer(description, [tmp_path])
    assert words in str(error.value)
    assert "model.tokenizer." in str(error.value)


def test_a_path_on_the_command_line(tmp_path: Path) -> None:
    directory = write_huggingface(tmp_path / "tokenizer.model")
    files = {
        directory: "huggingface",
        write_sentencepiece(tmp_path / "spm.model"): "sentencepiece",
        write_tiktoken(tmp_path / "vocab.json"): "tiktoken",
    }
    for path, library in files.items():
        assert from_path(str(path)).library == library
        assert build_tokenizer(from_path(str(path))).encode("one")
    assert from_path("some/name").library == "huggingface"
    with pytest.raises(ConfigError, match=r"--tokenizer .*none\.model: there is no such file"):
        from_path(str(tmp_path / "none.model"))
    with pytest.raises(ConfigError, match="a part of a Hugging Face tokenizer"):
        from_path(str(directory / "tokenizer.json"))


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    model = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no end-of-sequence token"):
        build_tokenizer(override(None, str(tmp_path), None))


def test_a_tokenizer_beside_its_checkpoint_is_found(tmp_path: Path) -> None:
    checkpoint, beside = tmp_path / "files", tmp_path
    (beside / "Llama-3.1-8B").mkdir(parents=True)
    checkpoint.mkdir()
    described = TokenizerDescription("huggingface", "meta-llama/Llama-3.1-8B", "it")
    assert local_path(described, [checkpoint, beside]) is None  # a directory of that name, but no tokenizer
    (beside / "Llama-3.1-8B" / "tokenizer.json").touch()
    assert local_path(described, [checkpoint, beside]) == beside / "Llama-3.1-8B"
    pieces = TokenizerDescription("sentencepiece", "nemo:abc_tokenizer.model", "it")
    (beside / "abc_tokenizer.model").touch()
    assert local_path(pieces, [checkpoint, beside]) == beside / "abc_tokenizer.model"
    (checkpoint / "abc_tokenizer.model").touch()
    assert local_path(pieces, [checkpoint, beside]) == checkpoint / "abc_tokenizer.model"


def test_a_tokenizer_given_by_its_path_is_an_override(tmp_path: Path) -> None:
    model = tmp_path / "pieces.model"
    model.touch()
    for path in (str(tmp_path), str(model), "owner/name"):
        described, found = from_path(path), override_from_path(path)
        again = override(*(found.get(key) for key in ("library", "type", "model")))
        assert (again.library, again.source) == (described.library, described.source)
    assert override_from_path(None) == {}
