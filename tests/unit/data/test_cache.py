"""Tokenized data are made once, and again when anything that they were made of has changed."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from pathlib import Path

import pytest

from nemo_spin.config import DatasetConfig
from nemo_spin.data.cache import UnusableEntryError, open_or_make
from nemo_spin.data.dataset import load_dataset
from nemo_spin.errors import DataError

LINE = '{"input": "abc", "output": "d"}'


def test_the_second_load_does_not_tokenize(write, tokenizer, cache):
    path = write(LINE, LINE)
    first = load_dataset(DatasetConfig((path,)), tokenizer, 10)
    tokenized = len(tokenizer.encoded)
    # neither the way the path is written, nor a stricter option that changes nothing, makes a difference
    second = load_dataset(DatasetConfig((os.path.relpath(path),), overlong="drop", on_bad_record="skip"), tokenizer, 10)
    assert list(second) == list(first)
    assert second.reports[0].kept == 2
    assert len(tokenizer.encoded) == tokenized
    assert len([entry for entry in cache.iterdir() if entry.is_dir()]) == 1


@pytest.mark.parametrize("change", ["file", "template", "tokenizer", "length", "bos"])
def test_a_change_is_noticed(write, make_tokenizer, change):
    path = write(LINE)
    length, options = 10, {}
    load_dataset(DatasetConfig((path,)), make_tokenizer(), length)
    tokenizer = make_tokenizer()
    if change == "file":
        stat = path.stat()
        path.write_text(LINE.replace("abc", "xyz") + "\n")
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    elif change == "tokenizer":
        tokenizer.fingerprint = "other"
    elif change == "length":
        length = 11
    else:
        options = {"template": {"prompt_template": "Q {input} {output}"}, "bos": {"add_bos": True}}[change]
    load_dataset(DatasetConfig((path,), **options), tokenizer, length)
    assert tokenizer.encoded


@pytest.mark.parametrize("damage", ["cut", "no report", "report", "empty", "no examples"])
def test_a_damaged_entry_is_made_anew(write, tokenizer, cache, damage):
    path = write(LINE)
    (example,) = load_dataset(DatasetConfig((path,)), tokenizer, 10)
    (entry,) = (entry for entry in cache.iterdir() if entry.is_dir())
    examples, report = entry / "examples.arrow", entry / "report.json"
    if damage == "cut":
        examples.write_bytes(examples.read_bytes()[:-20])
    elif damage == "empty":
        examples.write_bytes(bytes(examples.stat().st_size))
    elif damage == "report":
        report.write_text('{"bytes": 1')
    else:
        (report if damage == "no report" else examples).unlink()
    assert list(load_dataset(DatasetConfig((path,)), tokenizer, 10)) == [example]


def test_an_error_leaves_nothing_behind(write, tokenizer, cache):
    with pytest.raises(DataError):
        load_dataset(DatasetConfig((write(LINE, "broken"),)), tokenizer, 10)
    assert not [entry for entry in cache.iterdir() if entry.is_dir()]


def test_a_cache_that_cannot_be_written_is_a_sentence(write, tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        DataError, match=r"cannot be written to .*/file/cache \(Not a directory\): .*model.data.cache_dir"
    ):
        load_dataset(DatasetConfig((write(LINE),), cache_dir=tmp_path / "file" / "cache"), tokenizer, 10)


def test_a_full_disk_is_a_sentence(write, tokenizer, monkeypatch, cache):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nemo_spin.data.store.ArrowWriter.write_table", full)
    with pytest.raises(DataError, match=r"cannot be written to .* \(No space left on device\): make room there"):
        load_dataset(DatasetConfig((write(LINE),)), tokenizer, 10)
    assert not [entry for entry in cache.iterdir() if entry.is_dir()]


def _make_slowly(root: Path, barrier: multiprocessing.Barrier) -> None:
    def make(directory: Path) -> None:
        with open(root / "made", "a") as file:
            file.write("x")
        time.sleep(0.3)  # so that the other process comes while this one is at it
        (directory / "done").write_text("whole")

    def open_entry(directory: Path) -> str:
        try:
            return (directory / "done").read_text()
        except OSError as error:
            raise UnusableEntryError from error

    barrier.wait()
    assert open_or_make(root / "cache", "key", make, open_entry) == "whole"


def test_of_two_processes_one_makes_it(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    processes = [context.Process(target=_make_slowly, args=(tmp_path, barrier)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert (tmp_path / "made").read_text() == "x"


def test_what_a_killed_process_has_left_is_no_hindrance(write, tokenizer, cache):
    path = write(LINE)
    load_dataset(DatasetConfig((path,)), tokenizer, 10)
    (entry,) = (entry for entry in cache.iterdir() if entry.is_dir())
    unfinished = entry.with_name(f".unfinished-{entry.name}")
    entry.rename(unfinished)
    assert len(load_dataset(DatasetConfig((path,)), tokenizer, 10)) == 1
    assert not unfinished.exists()
    shutil.rmtree(entry)
