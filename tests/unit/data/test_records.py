"""The same records from every kind of file, and a sentence for what is none."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nemo_spin.config import DatasetConfig
from nemo_spin.data.dataset import load_dataset
from nemo_spin.data.records import read_records
from nemo_spin.errors import DataError

RECORDS = [
    {"input": "é", "output": "b"},
    {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]},
    {"prompt_ids": [20, 21], "response_ids": [2]},
]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


def zstd(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


def zstd_stream(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("name", "compress"),
    [
        ("data.jsonl", bytes),
        ("data.jsonl.gz", gzip.compress),
        ("data.jsonl.bz2", bz2.compress),
        ("data.jsonl.xz", lzma.compress),
        ("data.jsonl.zst", zstd_stream),
        ("compressed_but_not_named_so", gzip.compress),
    ],
)
def test_jsonl(tmp_path, name, compress):
    path = tmp_path / name
    path.write_bytes(compress(LINES))
    assert list(read_records(path)) == [(f"{path}:{n}", record) for n, record in enumerate(RECORDS, start=1)]


def test_parquet(tmp_path):
    path = tmp_path / "data.parquet"
    pq.write_table(pa.Table.from_pylist(RECORDS, schema=pa.schema([
        ("input", pa.string()),
        ("output", pa.string()),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("prompt_ids", pa.list_(pa.int64())),
        ("response_ids", pa.list_(pa.int64())),
    ])), path)  # fmt: skip
    assert list(read_records(path)) == [(f"{path}: row {n}", record) for n, record in enumerate(RECORDS, start=1)]


def test_a_saved_data_set(tmp_path, tokenizer):
    path = tmp_path / "saved"
    rows = [{"input": str(n), "output": "y"} for n in range(600)]
    saved = datasets.Dataset.from_list(rows).select(range(599, -1, -1))
    saved.save_to_disk(path)
    assert list(read_records(path)) == [(f"{path}: row {n}", record) for n, record in enumerate(rows[::-1], start=1)]
    assert len(load_dataset(DatasetConfig((path,)), tokenizer, 20)) == 600

    both = tmp_path / "both"
    datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(both)
    with pytest.raises(DataError, match=r"holds several splits of a data set: name one of them, .*/test, .*/train"):
        list(read_records(both))
    assert len(list(read_records(both / "train"))) == 600


def test_bad_rows_are_named(tmp_path, tokenizer):
    path = tmp_path / "data.parquet"
    broken = pa.array([b"x", b"\xff", b"z"]).view(pa.binary()).cast(pa.binary())
    text = pa.StringArray.from_buffers(3, broken.buffers()[1], broken.buffers()[2])
    pq.write_table(pa.table({"input": text, "output": pa.array(["y", "y", None])}), path)
    with pytest.raises(DataError, match=r"data.parquet: row 2: a text is not UTF-8"):
        list(read_records(path))
    dataset = load_dataset(DatasetConfig((path,), on_bad_record="skip"), tokenizer, 20)
    assert len(dataset) == 1
    assert [noted.places for noted in dataset.reports[0].skipped.values()] == [["row 2"], ["row 3"]]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("data.jsonl.gz", gzip.compress(LINES * 500)[:-30], "is damaged (gzip: "),
        ("data.jsonl.bz2", bz2.compress(LINES)[:-5], "is damaged (bzip2: "),
        ("data.jsonl.xz", lzma.compress(LINES)[:-5], "is damaged (xz: "),
        ("data.jsonl.zst", zstd_stream(LINES)[:12] + b"garbage" * 9, "is damaged (zstandard: "),
        ("data.jsonl.gz", LINES, "is not gzip, as its name says"),
        ("data.jsonl.zst", LINES, "is not zstandard, as its name says"),
        ("data.parquet", LINES, "is not parquet, as its name says"),
        ("data.parquet", b"PAR1" + LINES, "is damaged (parquet: "),
        ("data.jsonl", b"PK\x03\x04...", "is a zip archive: give JSONL"),
        ("data.jsonl.gz", gzip.compress(b"\n"), "is empty"),
        ("data.jsonl", b"", "is empty"),
        ("data.jsonl.gz", gzip.compress(LINES + b"{"), ":4: not valid JSON"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, name, content, says):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(read_records(path))
    assert says in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_places_that_are_no_file(tmp_path, tokenizer):
    with pytest.raises(DataError, match="is a directory, but not one of datasets"):
        list(read_records(tmp_path))
    with pytest.raises(DataError, match="does not exist"):
        list(read_records(tmp_path / "nowhere"))
    for path, says in ((tmp_path, "is a directory"), (tmp_path / "nowhere", "does not exist"), ("a\0b", "cannot be")):
        with pytest.raises(DataError, match=says):
            load_dataset(DatasetConfig((path,)), tokenizer, 9)
    (tmp_path / "empty").mkdir()
    empty = datasets.Dataset.from_dict({"input": [], "output": []})
    empty.save_to_disk(tmp_path / "empty")
    with pytest.raises(DataError, match="is empty: it needs at least one row"):
        list(read_records(tmp_path / "empty"))
