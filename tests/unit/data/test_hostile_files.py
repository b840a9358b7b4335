"""Files that would fill the memory, block, or lose data in silence."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nemo_spin.commands.data import _summary
from nemo_spin.config import DatasetConfig
from nemo_spin.data import jsonl, store, tables
from nemo_spin.data.dataset import load_dataset
from nemo_spin.data.records import identity_of, read_records
from nemo_spin.errors import DataError

LINE = b'{"input": "x", "output": "y"}\n'


def refusal(path) -> str:
    with pytest.raises(DataError) as caught:
        list(read_records(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("compress", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_a_line_that_is_too_long_is_not_kept(tmp_path, tokenizer, monkeypatch, compress):
    monkeypatch.setattr(jsonl, "MAX_RECORD_BYTES", 1000)
    longest = json.dumps({"input": "x", "output": "y" * (1000 - 29)}).encode() + b"\n"
    assert len(longest) == 1000
    path = tmp_path / "data.jsonl"
    path.write_bytes(compress(LINE + longest + b"[" * 5_000_000 + b"\n" + LINE + b" " * 1001 + b"\n" + LINE))
    assert refusal(path).startswith(f"{path}:3: the line is longer than ")
    dataset = load_dataset(DatasetConfig((path,), on_bad_record="skip"), tokenizer, 2000)
    assert len(dataset) == 4
    assert [noted.places for noted in dataset.reports[0].skipped.values()] == [["line 3", "line 5"]]


def test_a_name_that_no_terminal_shows(tmp_path, tokenizer, capsys):
    """Files keep names that are no text; sentences and reports do not."""
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\n.jsonl")
    with open(path, "wb") as file:
        file.write(LINE + b"broken\n")
    assert refusal(path) == f"{tmp_path}/\\udcff .jsonl:2: not valid JSON at column 1 (Expecting value): " + (
        "write one JSON object per line"
    )
    dataset = load_dataset(DatasetConfig((path,), on_bad_record="skip"), tokenizer, 9)
    assert list(dataset.reports[0].skipped) == ["not valid JSON at column N"]
    print(*_summary(dataset.reports[0]), sep="\n")
    assert "\\udcff\\n.jsonl: 2 records, 1 of them used" in capsys.readouterr().out


def test_a_key_that_is_there_twice_is_refused(write):
    path = write('{"input": "x", "output": "y", "input": "z"}')
    assert refusal(path) == (
        f"{path}:1: a key is there twice ('input'), and only one of its values could be used: remove the other"
    )
    nested = '{"messages": [{"role": "user", "role": "system", "content": "u"}]}'
    assert "a key is there twice ('role')" in refusal(write(nested))


@pytest.mark.parametrize("compress", [bz2.compress, lzma.compress], ids=["bzip2", "xz"])
def test_all_streams_of_a_compressed_file_are_read(tmp_path, compress):
    path = tmp_path / "data"
    path.write_bytes(compress(LINE * 3) + compress(LINE) + bytes(8) + compress(LINE * 2) + bytes(4))
    assert len(list(read_records(path))) == 6
    broken = bytearray(compress(LINE))
    broken[0] ^= 1  # Python's own readers take this for the end of the file
    path.write_bytes(compress(LINE * 3) + broken)
    assert "is damaged" in refusal(path)
    path.write_bytes(compress(LINE * 3)[:-9])
    assert "the file ends too early" in refusal(path)


def test_what_an_xz_file_may_ask_for_is_limited(tmp_path):
    path = tmp_path / "data.xz"
    greedy = [{"id": lzma.FILTER_LZMA2, "dict_size": 2**30 + 2**29}]
    path.write_bytes(lzma.compress(LINE, filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 2**20}]))
    assert len(list(read_records(path))) == 1
    try:
        path.write_bytes(lzma.compress(LINE, filters=greedy))
    except MemoryError:
        pytest.skip("this machine has no memory to write such a file")
    assert "Memory usage limit exceeded" in refusal(path)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path, tokenizer):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        assert "is not a file but a pipe or a device" in refusal(path)
        with pytest.raises(DataError, match="is not a file"):
            load_dataset(DatasetConfig((path,)), tokenizer, 9)


def test_links_in_a_circle(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "a")
    with pytest.raises(DataError, match="cannot be opened"):
        identity_of(tmp_path / "a")


def test_columns_of_one_name_are_refused(tmp_path):
    path = tmp_path / "data.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(["x"]), pa.array(["z"])], names=["input", "input"]), path)
    assert "has two columns 'input'" in refusal(path)


def test_a_row_without_a_value_for_python_is_named(tmp_path, tokenizer):
    path = tmp_path / "data.parquet"
    dates = pa.array([0, 2**60, 0], pa.timestamp("ms"))
    pq.write_table(pa.table({"input": ["a", "b", "c"], "output": ["x", "y", "z"], "date": dates}), path)
    assert refusal(path).startswith(f"{path}: row 2: a value cannot be read (")
    dataset = load_dataset(DatasetConfig((path,), on_bad_record="skip"), tokenizer, 9)
    assert len(dataset) == 2 and dataset.reports[0].skipped_count == 1


def test_a_row_that_is_too_long_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MAX_RECORD_BYTES", 100)
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table({"input": ["a", "b" * 200]}), path)
    assert refusal(path).startswith(f"{path}: row 2: the row is longer than ")


@pytest.fixture
def saved(tmp_path):
    datasets.Dataset.from_list([{"input": "abc", "output": "y"}] * 3).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize(
    "state",
    ["[]", "3", '{"_data_files": 3}', '{"_data_files": [3]}', '{"_data_files": [{"filename": 3}]}', "{", "[" * 99_999,
     '{"_data_files": [{"filename": "../data.arrow"}]}', '{"_data_files": [{"filename": "none"}]}', "{}", "\udcff"],
)  # fmt: skip
def test_the_description_of_a_saved_data_set(saved, state):
    (saved / "state.json").write_bytes(state.encode("utf-8", "surrogateescape"))
    assert f"the data set in {saved} is damaged" in refusal(saved)


def test_an_offset_out_of_the_file_is_not_followed(saved):
    (file,) = saved.glob("*.arrow")
    content = file.read_bytes()
    offsets = np.array([0, 3, 6, 9], np.int32)
    assert content.count(offsets.tobytes()) == 1
    offsets[2] = 2**30
    file.write_bytes(content.replace(np.array([0, 3, 6, 9], np.int32).tobytes(), offsets.tobytes()))
    assert f"the data set in {saved} is damaged" in refusal(saved)


def test_what_a_chat_template_makes_of_other_keys(write, make_tokenizer):
    tokenizer = make_tokenizer(render=lambda messages, asked: "".join(f"{turn}" for turn in map(str, messages)) + name)
    name = "\ud800"
    turns = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(DataError, match=r":1: what the chat template makes of the messages holds half of a surrogate"):
        load_dataset(DatasetConfig((write(json.dumps({"messages": turns})),)), tokenizer, 99)


def test_long_examples_are_written_before_their_offsets_overflow(write, tokenizer, monkeypatch):
    monkeypatch.setattr(store, "_TOKENS_AT_ONCE", 10)
    records = [{"prompt_ids": [9] * n, "response_ids": [8]} for n in (3, 3, 5, 1, 30, 2)]
    dataset = load_dataset(DatasetConfig((write(*map(json.dumps, records)),)), tokenizer, 99)
    assert [len(example.prompt_ids) for example in dataset] == [3, 3, 5, 1, 30, 2]
    assert dataset._stores[0]._prompts.num_chunks == 3


def test_a_prompt_of_which_cutting_leaves_nothing(write, tokenizer):
    path = write('{"input": "abcdef", "output": "xyz"}')
    with pytest.raises(
        DataError, match=r":1: nothing is left of the prompt when it is cut to 5 tokens with its respon"
    ):
        load_dataset(DatasetConfig((path,), overlong="truncate", truncation_field="input"), tokenizer, 5)
