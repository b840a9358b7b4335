from __future__ import annotations

import json
import random

import pytest

from nemo_spin.config import DatasetConfig
from nemo_spin.data.dataset import load_dataset
from nemo_spin.data.jsonl import read_jsonl
from nemo_spin.errors import DataError


def test_records_with_their_line_numbers(write):
    path = write(b'\xef\xbb\xbf{"a": 1}', "", "  \t\r", '{"b": NaN}\r', '{"c": "\u2028 é"}')
    lines = [(number, list(record)) for number, record in read_jsonl(path)]
    assert lines == [(1, ["a"]), (4, ["b"]), (5, ["c"])]


def test_reading_is_lazy(write):
    reader = read_jsonl(write('{"a": 1}', "broken"))
    assert next(reader) == (1, {"a": 1})
    with pytest.raises(DataError):
        next(reader)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"a": 1', "not valid JSON at column 8"),
        ('{"a": 1} {"a": 2}', "Extra data"),
        ("[", "one JSON object per line"),
        ('{"a": "\t"}', "Invalid control character"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 8"),
        (b'{"a": "\0"}', "NUL bytes"),
        ('["a"]', "found list"),
        ("null", "found NoneType"),
        ("[" * 200_000, "nested too deeply"),
        ('{"a": ' * 200_000, "nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "a JSON value cannot be read"),
    ],
)
def test_a_malformed_line_is_named(write, line, says):
    path = write('{"input": "x"}', "", line, '{"input": "y"}')
    with pytest.raises(DataError) as caught:
        list(read_jsonl(path))
    assert str(caught.value).startswith(f"{path}:3: ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_used(write, tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.jsonl does not exist"):
        list(read_jsonl(tmp_path / "nowhere.jsonl"))
    with pytest.raises(DataError, match="is a directory"):
        list(read_jsonl(tmp_path))
    with pytest.raises(DataError, match="cannot be opened"):
        list(read_jsonl("a\0b"))
    with pytest.raises(DataError, match="is empty"):
        list(read_jsonl(write("", "   ")))


def test_only_data_errors_come_out_of_random_files(write, tokenizer):
    rng = random.Random(0)
    good = [
        json.dumps({"input": "question é", "output": "answer"}),
        json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}),
        json.dumps({"prompt_ids": [1, 20], "response_ids": [30, 2]}),
    ]
    values = ["null", "true", "-1", "1e400", '""', "[]", "{}", "[[]]", '"\\ud800"', '"\\u0000"', '"tool"', "[1.5]", "{"]
    read, refusals = 0, []
    for _ in range(3000):
        line = bytearray(rng.choice(good).encode())
        match rng.randrange(3):
            case 0:
                line[rng.randrange(len(line))] = rng.choice([rng.randrange(256), rng.randrange(32, 127)])
            case 1:  # another value in place of one: the JSON often stays valid
                colons = [i for i, byte in enumerate(line) if byte == ord(":")]
                at = rng.choice(colons) + 1
                end = min(i for i in range(at, len(line)) if line[i] in b",}")
                line[at:end] = rng.choice(values).encode()
            case _:
                line = bytearray(rng.randbytes(rng.randrange(40)))
        path = write(b'{"input": "x", "output": "y"}', bytes(line).replace(b"\n", b" "))
        try:
            load_dataset(DatasetConfig((path,)), tokenizer, 1000)
            read += 1
        except DataError as error:
            refusals.append(str(error))
    assert all(refusal.startswith(f"{path}:2: ") for refusal in refusals)
    assert read > 100
    assert len(refusals) > 100
