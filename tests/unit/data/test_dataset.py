from __future__ import annotations

import json

import pytest

from nemo_spin.data.dataset import load_dataset
from nemo_spin.errors import ConfigError, DataError
from nemo_spin.pairs import Example

MIXED = [  # (line, prompt tokens, response tokens with the stop token), one token per character
    '{"input": "abc", "output": "d"}',  # 3 + 3: the space before the label, the label, </s>
    '{"prompt_ids": [9, 8, 7], "response_ids": [6]}',
    "",
    json.dumps({"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}),
]


def record(prompt: int, response: int) -> str:
    return json.dumps({"prompt_ids": [9] * prompt, "response_ids": [8] * response})


def test_examples_of_mixed_formats(write, tokenizer):
    dataset = load_dataset(write(*MIXED), tokenizer, max_seq_length=100)
    assert len(dataset) == 3
    assert dataset[0] == Example(0, tuple(tokenizer.encode("abc")), tuple(tokenizer.encode(" d</s>")))
    assert dataset[1] == Example(1, (9, 8, 7), (6,))
    assert tokenizer.decode(dataset[2].response_ids) == "a<|im_end|>"
    assert list(dataset) == [dataset[0], dataset[1], dataset[2]]
    assert dataset.has_chat
    for index in (-1, 3):
        with pytest.raises(IndexError):
            dataset[index]


def test_chat_is_noticed_only_where_it_is_used(write, tokenizer):
    assert not load_dataset(write(*MIXED[:2]), tokenizer, max_seq_length=100).has_chat
    assert not load_dataset(write(*MIXED), tokenizer, max_seq_length=10, overlong="drop").has_chat


def test_the_length_limit_is_exact(write, tokenizer):
    path = write(record(7, 3), record(9, 1))
    dataset = load_dataset(path, tokenizer, max_seq_length=10)
    assert [len(example.prompt_ids) for example in dataset] == [7, 9]
    assert str(dataset.report) == f"{path}: read 2 examples, longest 10 tokens"


OVERLONG = [record(7, 3), record(7, 4), "", record(10, 1), record(2, 2), record(30, 1)]


def test_overlong_examples_are_refused_with_numbers(write, tokenizer):
    path = write(*OVERLONG, *[record(11, 1)] * 4)
    with pytest.raises(DataError) as caught:
        load_dataset(path, tokenizer, max_seq_length=10)
    assert str(caught.value) == (
        f"{path}: 7 of 9 examples are longer than max_seq_length = 10 tokens (6 by their prompt alone), "
        "at line 2, 4, 6, 7, 8, ..., the longest 31: "
        "raise max_seq_length as far as the model goes, or set overlong: drop"
    )


def test_overlong_examples_are_dropped_and_counted(write, tokenizer):
    path = write(*OVERLONG)
    dataset = load_dataset(path, tokenizer, max_seq_length=10, overlong="drop")
    assert [(example.index, len(example.prompt_ids), len(example.response_ids)) for example in dataset] == [
        (0, 7, 3),
        (1, 2, 2),
    ]
    assert dataset.report.kept == 2
    assert str(dataset.report) == (
        f"{path}: read 5 examples, longest 31 tokens; kept 2, dropped 3 longer than 10 "
        "(2 by their prompt alone, 1 with their response)"
    )


def test_nothing_left_is_an_error(write, tokenizer):
    with pytest.raises(DataError, match="all 5 examples are longer than max_seq_length = 3 "):
        load_dataset(write(*OVERLONG), tokenizer, max_seq_length=3, overlong="drop")


def test_a_bad_line_is_named_by_its_place_in_the_file(write, tokenizer):
    path = write(*MIXED, '{"input": "x"}')
    with pytest.raises(DataError) as caught:
        load_dataset(path, tokenizer, max_seq_length=100)
    assert str(caught.value).startswith(f"{path}:5: ")


def test_options_are_checked_before_the_file_is_read(tokenizer):
    with pytest.raises(ConfigError, match="use refuse or drop"):
        load_dataset("nowhere", tokenizer, max_seq_length=9, overlong="truncate")
    with pytest.raises(ConfigError, match="prompt_template"):
        load_dataset("nowhere", tokenizer, max_seq_length=9, prompt_template="{input}")
