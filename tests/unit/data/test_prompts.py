"""Prompts as they come: with and without responses and ids, and every way in which they cannot be used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_spin.data.encoder import RecordEncoder
from nemo_spin.data.prompts import read_prompts
from nemo_spin.errors import DataError

Write = Callable[..., Path]
LONGEST = 24


def read(path: Path, tokenizer: Any, **options: Any) -> tuple:
    return read_prompts(path, RecordEncoder(tokenizer), LONGEST, **options)


def test_every_kind_of_prompt_with_and_without_an_id(write: Write, tokenizer: Any) -> None:
    rows = [
        {"prompt": "Hi"},
        {"prompt_ids": [9, 10], "id": "b"},
        {"input": "Hi", "output": "unused", "id": 1.5},
        {"input": "Hi"},
        {"prompt": "Hi", "id": None},
    ]
    prompts, report = read(write(*map(json.dumps, rows), ""), tokenizer)
    assert [(prompt.index, prompt.id) for prompt in prompts] == [(0, 0), (1, "b"), (2, 1.5), (3, 3), (4, 4)]
    assert [list(prompt.ids) for prompt in prompts] == [tokenizer.encode("Hi"), [9, 10], *[tokenizer.encode("Hi")] * 3]
    assert report.read == 5
    assert report.formats == {"template": 4, "token ids": 1}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"prompt": "x" * LONGEST}, f"leaves no room for a response: it has {LONGEST} tokens"),
        ({"prompt_ids": [5, 2000]}, "prompt_ids[1] is 2000"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": "Hi", "id": 0}, "the id is that of line 1 (0)"),
        ({"prompt": "Hi", "id": True}, "'id' must be a string or a number, found a boolean"),
        ({"prompt": "Hi", "id": float("nan")}, "found nan"),
        ({"prompt": "Hi", "id": [1]}, "found a list"),
        ({"question": "Hi"}, "'input' of prompt_template is missing"),
        ("no json", "not valid JSON"),
    ],
)
def test_a_bad_prompt_is_named_or_left_out(write: Write, tokenizer: Any, line: Any, words: str) -> None:
    good = [json.dumps({"prompt": text}) for text in ("one", "two")]
    path = write(good[0], line if isinstance(line, str) else json.dumps(line), good[1])
    with pytest.raises(DataError) as raised:
        read(path, tokenizer)
    assert str(raised.value).startswith(f"{path}:2: ")
    assert words in str(raised.value)
    prompts, report = read(path, tokenizer, on_bad_record="skip")
    # the index is that of training, which counts what it uses
    assert [(prompt.index, prompt.id) for prompt in prompts] == [(0, 0), (1, 1)]
    assert "skipped 1" in str(report)
    assert "(line 2)" in str(report)


def test_a_file_without_a_usable_prompt_is_refused(write: Write, tokenizer: Any) -> None:
    with pytest.raises(DataError, match="is empty"):
        read(write(), tokenizer)
    with pytest.raises(DataError, match="none of its 1 records can be used"):
        read(write("[]"), tokenizer, on_bad_record="skip")
