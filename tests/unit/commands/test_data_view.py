"""`nemo-spin data`: everything that training would do is shown, and a refusal is the exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nemo_spin.cli.main import main

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)
WORDS = ["<unk>", "</s>", "<|im_start|>", "<|im_end|>", "<extra_id_1>", *"user assistant one two three four".split()]


def chat(answer: str) -> list[dict]:
    return [{"role": "user", "content": "one two"}, {"role": "assistant", "content": answer}]


@pytest.fixture
def tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", eos_token="</s>")
    made.add_special_tokens({"additional_special_tokens": WORDS[2:5]})
    made.chat_template = CHATML
    made.save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def write(path: Path, *records: dict | str) -> str:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in records))
    return str(path)


def test_all_is_shown(tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(
        tmp_path / "data.jsonl",
        {"input": "one", "output": "two three"},
        {"input": "one " * 30, "output": "two"},
        "broken",
        {"real": chat("three"), "generated": chat("four \u001b")},
    )
    options = ["--tokenizer", tokenizer, "--max-seq-length", "20"]
    assert main(["data", data, *options, "--overlong", "drop", "--on-bad-record", "skip"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(
        f"{data}: 4 records, 2 of them used, the longest of 32 tokens\n"
        "  1 in the format template\n"
        "  1 in the format real/generated\n"
        "  dropped 1 longer than 20 tokens (1 by their prompt alone, 0 with their response; line 2)\n"
        "  skipped 1: not valid JSON at column N (line 3)\n"
    )
    lengths = {line.split()[0]: line.split()[1:] for line in shown.splitlines() if line[:1].islower()}
    assert lengths["prompt"] == ["1", "1", "1", "7", "7", "7", "4.0", "8"]
    assert lengths["response"] == ["2", "2", "2", "3", "3", "3", "2.5", "5"]
    assert "one of the stop tokens </s> (id 1), <|im_end|> (id 3)." in shown
    assert "\none« two three</s>»\n" in shown
    assert "<|im_start|> user one two<|im_end|><|im_start|> assistant« three<|im_end|>»\n" in shown
    assert "--- its given rejected response\n four <unk><|im_end|>\n" in shown
    assert "\x1b" not in shown

    # training would stop at the first thing that it is not told to leave out
    assert main(["data", data, *options, "--overlong", "drop"]) == 2
    assert f"Training would refuse this: {data}:3: not valid JSON" in capsys.readouterr().out
    assert main(["data", data, *options, "--on-bad-record", "skip"]) == 2
    assert "1 of 3 examples are longer than max_seq_length = 20" in capsys.readouterr().out


def test_what_cannot_be_shown_is_said(tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "bad.jsonl", {"input": "one"})
    assert main(["data", data, "--tokenizer", tokenizer]) == 2
    assert "1 records, 0 of them used" in capsys.readouterr().out
    for arguments, says in [
        ([str(tmp_path / "none.jsonl"), "--tokenizer", tokenizer], "none.jsonl does not exist"),
        ([data, "--tokenizer", str(tmp_path / "none")], "which is not there"),
        ([data, "--tokenizer", tokenizer, "--max-seq-length", "1"], "--max-seq-length 1: use at least 2"),
        ([data, "--tokenizer", tokenizer, "--chat-prompt-token", "turn=x"], "write NAME=TEXT with one of system_turn_"),
    ]:
        assert main(["data", *arguments]) == 2
        assert says in capsys.readouterr().err
