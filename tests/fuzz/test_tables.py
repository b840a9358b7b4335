"""Compressed files, parquet and saved data sets: every record, or one sentence; never a part of them in silence."""

from __future__ import annotations

import json
import tempfile
from itertools import accumulate
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bytes_tokenizer import BytesTokenizer
from data_inputs import ANY_VALUE, COMPRESSIONS, changed
from fuzzing import Fuzz, check_sentence
from hypothesis import strategies as st
from test_data_files import check_cache

from nemo_spin.config import DatasetConfig
from nemo_spin.data.dataset import load_dataset
from nemo_spin.data.records import read_records
from nemo_spin.errors import UserError

LINES = [json.dumps({"input": f"question {n}", "output": "x" * n}).encode() + b"\n" for n in range(40)]


def outcome(path: Path, number: int) -> str:
    """What became of a file of `number` records: read whole, or refused in a sentence."""
    try:
        records = list(read_records(path))
    except UserError as error:
        check_sentence(error, path.name)
        return "refused"
    assert len(records) == number
    return "read"


# (suffix, how many streams the file has, what happens to which byte of it)
DAMAGE = st.tuples(
    st.sampled_from(sorted(COMPRESSIONS)),
    st.integers(1, 3),
    st.sampled_from(["end lost", "byte", "header", "more", "none"]),
    st.integers(0, 10_000),
    st.binary(min_size=1, max_size=8).filter(lambda more: more.strip(b"\0")),
)


def test_compressed_files(fuzz: Fuzz) -> None:
    tally = fuzz(DAMAGE, lambda damage: check_compressed(*damage), number=300)
    assert tally.outcomes["read"] > 0.03 * tally.tried and tally.outcomes["refused"] > 0.03 * tally.tried


def check_compressed(suffix: str, streams: int, damage: str, at: int, more: bytes) -> str:
    """Damage is found, wherever it is: by a checksum, a missing end, or bytes that belong to no stream."""
    compress, step = COMPRESSIONS[suffix], -(-len(LINES) // streams)
    parts = [compress(b"".join(LINES[first : first + step])) for first in range(0, len(LINES), step)]
    content = bytearray(b"".join(parts))
    at %= len(content)
    if damage == "end lost" and at not in accumulate(map(len, parts)):  # there, it is a sound file of fewer lines
        del content[at:]
    elif damage == "header":  # of the last stream, which Python's own readers may take for the end of the file
        content[sum(map(len, parts[:-1])) + at % 3] ^= 1
    elif damage == "byte" and suffix != ".zst":  # Arrow writes no checksums into these
        content[at] ^= more[0] or 1
    elif damage == "more":
        content += more
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / f"data.jsonl{suffix}"
        path.write_bytes(content)
        return outcome(path, len(LINES))


TYPES = [
    pa.string(), pa.large_string(), pa.string_view(), pa.int64(), pa.uint64(), pa.float16(), pa.bool_(), pa.binary(),
    pa.null(), pa.timestamp("ms"), pa.timestamp("s", tz="Nowhere/Bad"), pa.date32(), pa.date64(), pa.time64("ns"),
    pa.duration("s"),
    pa.duration("s"), pa.decimal128(38, 2), pa.list_(pa.int64()), pa.map_(pa.string(), pa.int64()),
    pa.dictionary(pa.int8(), pa.string()),
    pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])),
    pa.struct([("role", pa.string()), ("role", pa.string())]),
]  # fmt: skip
NAMES = ["input", "messages", "prompt_ids", "real", "id", "date", "é", ""]
COLUMNS = st.lists(
    st.tuples(st.sampled_from(NAMES), st.sampled_from(TYPES), st.binary(min_size=64, max_size=64), st.booleans()),
    max_size=4,
)
BYTES = st.none() | st.tuples(st.integers(0, 10_000), st.integers(0, 255))


def column(kind: pa.DataType, noise: bytes, with_nulls: bool) -> pa.Array:
    """Three values of the type, made of any bytes: texts that are not UTF-8, dates after the last year, and so on."""
    if kind in (pa.string(), pa.binary()):
        text = pa.array([noise[:5], noise[5:9], b"y"], pa.binary())
        return pa.Array.from_buffers(kind, 3, text.buffers())
    if not (pa.types.is_primitive(kind) or pa.types.is_decimal(kind)):
        return pa.nulls(3, kind)
    validity = pa.py_buffer(b"\x05") if with_nulls else None
    return pa.Array.from_buffers(kind, 3, [validity, pa.py_buffer(noise)])


@pytest.mark.filterwarnings("ignore")
def test_parquet_files(fuzz: Fuzz) -> None:
    fuzz(st.tuples(COLUMNS, BYTES), lambda given: check_parquet(*given), number=150)


def check_parquet(columns: list[tuple[Any, ...]], damage: tuple[int, int] | None) -> str:
    texts = [pa.array(["a", "b", "c"])] * 2
    table = pa.Table.from_arrays(
        [*texts, *(column(*rest) for _, *rest in columns)], names=["input", "output", *(name for name, *_ in columns)]
    )
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "data.parquet"
        try:
            pq.write_table(table, path)
        except pa.ArrowException:
            return "not written"
        if damage:
            flip(path, *damage)
        return load(path, Path(directory) / "cache", None if damage else 3)


def flip(path: Path, at: int, bits: int) -> None:
    content = bytearray(path.read_bytes())
    content[at % len(content)] ^= bits
    path.write_bytes(content)


def load(path: Path, cache: Path, number: int | None) -> str:
    try:
        dataset = load_dataset(DatasetConfig((path,), on_bad_record="skip", cache_dir=cache), BytesTokenizer(), 99)
    except UserError as error:
        check_sentence(error, str(path))
        return "refused"
    finally:
        check_cache(cache)
    (report,) = dataset.reports
    assert number is None or report.read + report.skipped_count == number
    return "read"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a saved data set: name -> content."""
    path = tmp_path_factory.mktemp("saved") / "data"
    rows = [{"input": str(n), "output": "y", "messages": None} for n in range(3)]
    turns = [{"role": "user", "content": "é"}, {"role": "assistant", "content": "a"}]
    datasets.Dataset.from_list([*rows, {"messages": turns}]).save_to_disk(path)
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_saved_data_sets(fuzz: Fuzz, saved: dict[str, bytes]) -> None:
    state = json.loads(saved["state.json"])
    other_state = (changed(state) | ANY_VALUE).map(lambda value: json.dumps(value).encode())
    (arrow,) = (name for name in saved if name.endswith(".arrow"))
    one = st.sampled_from(sorted(saved)).flatmap(lambda name: st.tuples(st.just(name), st.binary(max_size=40)))
    changes = st.one_of(
        st.tuples(st.just("state.json"), other_state | st.binary(max_size=40)),
        st.tuples(st.just(arrow), st.tuples(st.integers(0, 10_000), st.integers(0, 255))),
        one,
    )
    fuzz(changes, lambda change: check_saved(saved, *change), number=200)


def check_saved(files: dict[str, bytes], changed_name: str, change: bytes | tuple[int, int]) -> str:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "saved"
        path.mkdir()
        for name, content in files.items():
            (path / name).write_bytes(content)
        if isinstance(change, bytes):
            (path / changed_name).write_bytes(change)
        else:
            flip(path / changed_name, *change)
        return load(path, Path(directory) / "cache", None)
