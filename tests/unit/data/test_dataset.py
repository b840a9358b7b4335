from __future__ import annotations

import json

import pytest

from nemo_spin.config import DatasetConfig
from nemo_spin.data.dataset import load_dataset
from nemo_spin.data.example import Example
from nemo_spin.errors import ConfigError, DataError

MIXED = [  # (line, prompt tokens, response tokens with the stop token), one token per character
    '{"input": "abc", "output": "d"}',  # 3 + 3: the space before the label, the label, </s>
    '{"prompt_ids": [9, 8, 7], "response_ids": [6]}',
    "",
    json.dumps({"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}),
]


def record(prompt: int, response: int) -> str:
    return json.dumps({"prompt_ids": [9] * prompt, "response_ids": [8] * response})


def test_examples_of_mixed_formats(write, tokenizer):
    dataset = load_dataset(DatasetConfig((write(*MIXED),)), tokenizer, 100)
    assert len(dataset) == 3
    assert dataset[0] == Example(0, tuple(tokenizer.encode("abc")), tuple(tokenizer.encode(" d</s>")))
    assert dataset[1] == Example(1, (9, 8, 7), (6,))
    assert tokenizer.decode(dataset[2].response_ids) == "a<|im_end|>"
    assert list(dataset) == [dataset[0], dataset[1], dataset[2]]
    assert dataset.stop_ids == {2, 5}
    assert dataset.reports[0].formats == {"template": 1, "token ids": 1, "messages": 1}
    for index in (-1, 3):
        with pytest.raises(IndexError):
            dataset[index]


def test_chat_is_noticed_only_where_it_is_used(write, tokenizer):
    assert load_dataset(DatasetConfig((write(*MIXED[:2]),)), tokenizer, 100).stop_ids == {2}
    assert load_dataset(DatasetConfig((write(*MIXED),), overlong="drop"), tokenizer, 10).stop_ids == {2}


def test_the_length_limit_is_exact(write, tokenizer):
    path = write(record(7, 3), record(9, 1))
    dataset = load_dataset(DatasetConfig((path,)), tokenizer, 10)
    assert [len(example.prompt_ids) for example in dataset] == [7, 9]
    assert str(dataset.reports[0]) == f"{path}: read 2 examples, longest 10 tokens"


OVERLONG = [record(7, 3), record(7, 4), "", record(10, 1), record(2, 2), record(30, 1)]


def test_overlong_examples_are_refused_with_numbers(write, tokenizer):
    path = write(*OVERLONG, *[record(11, 1)] * 4)
    with pytest.raises(DataError) as caught:
        load_dataset(DatasetConfig((path,)), tokenizer, 10)
    assert str(caught.value) == (
        f"{path}: 7 of 9 examples are longer than max_seq_length = 10 tokens (6 by their prompt alone), "
        "at line 2, 4, 6, 7, 8, ..., the longest 31: "
        "raise max_seq_length as far as the model goes, or set overlong: drop"
    )


def test_overlong_examples_are_dropped_and_counted(write, tokenizer):
    path = write(*OVERLONG)
    dataset = load_dataset(DatasetConfig((path,), overlong="drop"), tokenizer, 10)
    assert [(example.index, len(example.prompt_ids), len(example.response_ids)) for example in dataset] == [
        (0, 7, 3),
        (1, 2, 2),
    ]
    assert dataset.reports[0].kept == 2
    assert str(dataset.reports[0]) == (
        f"{path}: read 5 examples, kept 2, longest 31 tokens; dropped 3 longer than 10 tokens "
        "(2 by their prompt alone, 1 with their response; line 2, 4, 6)"
    )


def test_nothing_left_is_an_error(write, tokenizer):
    with pytest.raises(DataError, match="all 5 examples are longer than max_seq_length = 3 "):
        load_dataset(DatasetConfig((write(*OVERLONG),), overlong="drop"), tokenizer, 3)


def test_a_bad_line_is_named_by_its_place_in_the_file(write, tokenizer):
    path = write(*MIXED, '{"input": "x"}')
    with pytest.raises(DataError) as caught:
        load_dataset(DatasetConfig((path,)), tokenizer, 100)
    assert str(caught.value).startswith(f"{path}:5: ")


def test_options_are_checked_before_the_file_is_read(tokenizer):
    for options, says in [
        ({"overlong": "cut"}, "use refuse, drop or truncate"),
        ({"overlong": "truncate"}, "needs a truncation_field"),
        ({"on_bad_record": "ignore"}, "use error or skip"),
        ({"weights": [1, 2]}, "for each of the 1 files"),
        ({"weights": [0]}, "above 0"),
    ]:
        with pytest.raises(ConfigError, match=says):
            load_dataset(DatasetConfig(("nowhere",), **options), tokenizer, 9)
    with pytest.raises(ConfigError, match="names no file"):
        load_dataset(DatasetConfig(()), tokenizer, 9)
    with pytest.raises(ConfigError, match="prompt_template"):
        load_dataset(DatasetConfig(("nowhere",), prompt_template="{input}"), tokenizer, 9)


# records that cannot be used

BAD = ['{"input": "x"}', "[]", b"\xff", '{"input": "x", "output": ""}', '{"input": "y"}', '{"prompt_ids": [1, 9999]}']


def test_bad_records_are_skipped_and_counted_by_reason(write, tokenizer):
    path = write(MIXED[0], *BAD)
    dataset = load_dataset(DatasetConfig((path,), on_bad_record="skip"), tokenizer, 100)
    assert len(dataset) == 1
    report = dataset.reports[0]
    assert {reason: (noted.count, noted.places) for reason, noted in report.skipped.items()} == {
        "the key 'output' of prompt_template is missing": (2, ["line 2", "line 6"]),
        "expected a JSON object, found list": (1, ["line 3"]),
        "not UTF-8 at byte N": (1, ["line 4"]),
        "the response is empty": (1, ["line 5"]),
        "prompt_ids[N] is N": (1, ["line 7"]),
    }
    assert "; skipped 2: the key 'output' of prompt_template is missing (line 2, 6)" in str(report)
    # what is kept of it does not make the file good
    with pytest.raises(DataError, match=r":2: the key 'output' of prompt_template is missing \(the record has"):
        load_dataset(DatasetConfig((path,)), tokenizer, 100)


def test_a_file_with_nothing_but_bad_records_is_an_error(write, tokenizer):
    with pytest.raises(DataError, match=r"none of its 6 records can be used, the first because of this: .*:1: the key"):
        load_dataset(DatasetConfig((write(*BAD),), on_bad_record="skip"), tokenizer, 100)


def test_truncated_records_are_counted(write, tokenizer):
    lines = [json.dumps({"input": text, "output": "y"}) for text in ("abc", "abcdefgh", "abcdefghi")]
    options = {"overlong": "truncate", "truncation_field": "input"}
    dataset = load_dataset(DatasetConfig((write(*lines),), **options), tokenizer, 9)
    assert [tokenizer.decode(example.prompt_ids) for example in dataset] == ["abc", "abcdef", "abcdef"]
    assert str(dataset.reports[0]).endswith("read 3 examples, longest 12 tokens; cut 2 to 9 tokens (line 2, 3)")
    with pytest.raises(DataError, match="at line 1, the longest 11: what truncation_field names is not enough to cut"):
        load_dataset(DatasetConfig((write(record(10, 1)),), **options), tokenizer, 9)


# given rejected responses


def pair(generated: str) -> str:
    user = {"role": "user", "content": "u"}
    answers = {"real": "a", "generated": generated}
    return json.dumps({name: [user, {"role": "assistant", "content": text}] for name, text in answers.items()})


def test_given_rejected_responses(write, tokenizer):
    dataset = load_dataset(DatasetConfig((write(pair("bbb"), MIXED[1], pair("")),)), tokenizer, 100)
    assert tokenizer.decode(dataset.given_rejected(0)) == "bbb<|im_end|>"
    assert dataset.given_rejected(1) is None
    assert dataset.given_rejected(2) is None
    assert dataset.num_given_rejected == 1
    room = len(dataset[0].prompt_ids) + 3
    cut = load_dataset(DatasetConfig((write(pair("bbbb")),)), tokenizer, room)
    assert tokenizer.decode(cut.given_rejected(0)) == "bbb"  # no stop token: it was cut off
    assert cut.reports[0].cut_rejected == 1


# several files


def test_several_files_follow_each_other(write, tokenizer, tmp_path):
    second = tmp_path / "second.jsonl"
    second.write_text(record(2, 1) + "\n" + pair("b") + "\n")
    dataset = load_dataset(DatasetConfig((write(*MIXED), second), weights=[1, 0.5]), tokenizer, 100)
    assert [(share.num_examples, share.weight) for share in dataset.shares] == [(3, 1), (2, 0.5)]
    assert [example.index for example in dataset] == [0, 1, 2, 3, 4]
    assert dataset[3] == Example(3, (9, 9), (8,))
    assert tokenizer.decode(dataset.given_rejected(4)) == "b<|im_end|>"
    prompts, responses = dataset.lengths()
    assert prompts.tolist() == [len(example.prompt_ids) for example in dataset]
    assert responses.tolist() == [len(example.response_ids) for example in dataset]


def test_more_examples_than_a_batch_of_the_file(write, tokenizer):
    dataset = load_dataset(
        DatasetConfig((write(*[record(i % 7 + 1, i % 3 + 1) for i in range(9000)]),)), tokenizer, 100
    )
    for index in (0, 1, 4095, 4096, 4097, 8191, 8192, 8999):
        assert dataset[index] == Example(index, (9,) * (index % 7 + 1), (8,) * (index % 3 + 1))
