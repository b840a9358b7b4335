"""Whatever a data file holds: examples that keep the contracts and a count of the rest, or one sentence."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bytes_tokenizer import BytesTokenizer
from data_inputs import DataFile, Line, data_files
from fuzzing import Fuzz, check_sentence
from hypothesis import strategies as st

from nemo_spin.config import DatasetConfig
from nemo_spin.data.dataset import SFTDataset, load_dataset
from nemo_spin.data.encoder import RecordEncoder
from nemo_spin.data.prompts import read_prompts
from nemo_spin.errors import UserError

TOKENIZER = BytesTokenizer()
OPTIONS = st.fixed_dictionaries(
    {
        "max_seq_length": st.sampled_from([2, 40, 100, 10_000, 2**31 - 1, 2**31 - 1]),
        "on_bad_record": st.sampled_from(["error", "skip", "skip"]),
        "overlong": st.sampled_from(["refuse", "drop", "truncate"]),
        "truncation_field": st.just("input"),
        "truncation_method": st.sampled_from(["left", "right"]),
        "add_bos": st.booleans(),
        "add_eos": st.booleans(),
    }
)


@contextmanager
def written(file: DataFile) -> Iterator[tuple[Path, Path]]:
    """(the file, a directory for tokenized data), for as long as they are needed."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / file.name
        path.write_bytes(file.content)
        yield path, Path(directory) / "cache"


def test_data_files(fuzz: Fuzz) -> None:
    tally = fuzz(st.tuples(data_files(), OPTIONS), lambda given: check_data(*given), number=300)
    assert tally.outcomes["read"] > 0.03 * tally.tried and tally.outcomes["refused"] > 0.03 * tally.tried


def check_data(file: DataFile, options: dict[str, Any]) -> str:
    with written(file) as (path, cache):
        try:
            dataset = loaded(path, cache, **options)
        except UserError as error:
            check_refusal(error, path, file, options)
            # an entry is made before its length is looked at, and is whole then
            check_cache(cache)
            return "refused"
        check_cache(cache)
        check_examples(dataset, options)
        check_nothing_is_lost(dataset, file, options)
        return "read"


def loaded(path: Path, cache: Path, *, max_seq_length: int, **options: Any) -> SFTDataset:
    return load_dataset(DatasetConfig((str(path),), cache_dir=str(cache), **options), TOKENIZER, max_seq_length)


def check_refusal(error: UserError, path: Path, file: DataFile, options: dict[str, Any]) -> None:
    check_sentence(error, str(path))
    sentence = str(error)
    named = re.match(rf"{re.escape(str(path))}:(\d+): ", sentence)
    if file.whole and named:
        assert options["on_bad_record"] == "error"
        guilty, before = file.lines[int(named[1]) - 1], file.lines[: int(named[1]) - 1]
        assert guilty.texts is None or "no room" in sentence or "nothing is left" in sentence, (
            f"a sound line is refused: {sentence}"
        )
        assert guilty.text.strip() or before == [], f"a blank line is refused: {sentence}"


def check_cache(cache: Path) -> None:
    for entry in cache.iterdir() if cache.is_dir() else ():
        assert entry.suffix == ".lock" or {file.name for file in entry.iterdir()} == {"examples.arrow", "report.json"}


def check_examples(dataset: SFTDataset, options: dict[str, Any]) -> None:
    (report,) = dataset.reports
    assert len(dataset) == report.kept == sum(report.formats.values()) > 0
    assert 2 <= dataset.longest <= options["max_seq_length"]
    stops_everywhere = options["add_eos"] and "token ids" not in report.formats
    for index, example in enumerate(dataset):
        rejected = dataset.given_rejected(index)
        assert example.index == index and example.prompt_ids and example.response_ids
        assert (
            len(example.prompt_ids) + max(len(example.response_ids), len(rejected or ())) <= options["max_seq_length"]
        )
        ids = {*example.prompt_ids, *example.response_ids, *(rejected or ())}
        assert all(type(token) is int and 0 <= token < TOKENIZER.vocab_size for token in ids)
        assert not stops_everywhere or example.response_ids[-1] in dataset.stop_ids


def check_nothing_is_lost(dataset: SFTDataset, file: DataFile, options: dict[str, Any]) -> None:
    if not file.whole:
        return
    (report,) = dataset.reports
    lines = [line for line in file.lines if line.text.strip() not in (b"", b"\xef\xbb\xbf")]
    byte_order_marks = [line for line in file.lines[1:] if line.text.strip() == b"\xef\xbb\xbf"]
    assert report.read + report.skipped_count in (len(lines), len(lines) + len(byte_order_marks))
    assert report.read <= len(lines) - sum(line.is_bad for line in lines), "a line is read that cannot be"
    assert options["on_bad_record"] == "skip" or report.skipped_count == 0
    assert options["overlong"] == "drop" or report.dropped.count == 0
    if report.truncated.count or report.dropped.count:
        return
    loaded = iter([tuple(map(TOKENIZER.decode, (one.prompt_ids, one.response_ids))) for one in dataset])
    for line in lines:
        if line.texts is not None:
            assert expected(line, options) in loaded, f"{line} is lost, or comes too late"


def expected(line: Line, options: dict[str, Any]) -> tuple[str, str]:
    """The texts of a sound line, with the BOS and the EOS that the options ask for around those of a template."""
    prompt, response = line.texts
    if not line.is_template:
        return prompt, response
    return "<s>" * options["add_bos"] + prompt, response + "</s>" * options["add_eos"]


def test_prompts(fuzz: Fuzz) -> None:
    limits = st.tuples(data_files(), st.sampled_from([2, 40, 10_000]), st.sampled_from(["error", "skip"]))
    fuzz(limits, lambda given: check_prompts(*given), number=200)


def check_prompts(file: DataFile, max_seq_length: int, on_bad_record: str) -> str:
    with written(file) as (path, _):
        try:
            prompts, report = read_prompts(path, RecordEncoder(TOKENIZER), max_seq_length, on_bad_record)
        except UserError as error:
            check_refusal(error, path, file, {"on_bad_record": on_bad_record})
            return "refused"
        assert [prompt.index for prompt in prompts] == list(range(report.read))
        assert len({prompt.id for prompt in prompts}) == len(prompts)
        for prompt in prompts:
            assert 0 < len(prompt.ids) < max_seq_length
            assert all(0 <= token < TOKENIZER.vocab_size for token in prompt.ids)
        return "read"
