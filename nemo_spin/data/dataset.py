"""A data set: all examples of its files, tokenized once, kept on disk and read from there when they are needed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from nemo_spin.config.dataset import ON_BAD_RECORD, OVERLONG, DatasetConfig
from nemo_spin.data.cache import UnusableEntryError, key_of, open_or_make
from nemo_spin.data.encoder import RecordEncoder
from nemo_spin.data.example import Example
from nemo_spin.data.load_report import LoadReport
from nemo_spin.data.order import Share
from nemo_spin.data.records import identity_of, place_of, read_records
from nemo_spin.data.store import ExampleStore, ExampleWriter
from nemo_spin.data.tokenizer import TextTokenizer
from nemo_spin.errors import ConfigError, DataError

# Part of every cache entry's name: to be raised when the same record may become other tokens than before.
_VERSION = 1
_EXAMPLES, _REPORT = "examples.arrow", "report.json"


@dataclass(frozen=True, slots=True)
class TokenizedFile:
    """One data file, tokenized. digest: of its examples."""

    examples: ExampleStore
    report: LoadReport
    digest: str


class SFTDataset:
    """Prompts with their human responses. `dataset[i]` is the Example with index i, for i from 0 to len - 1.

    reports: what was read and left out, for each file.
    shares: how much of each file belongs to an epoch, in the order of the examples. See `order.epoch_order`.
    stop_ids: the ids at which generation stops for examples like these.
    digest: a hash of all examples in their order, whatever the files are called.
    """

    def __init__(self, files: Sequence[TokenizedFile], weights: Sequence[float], stop_ids: frozenset[int]) -> None:
        self.reports = tuple(file.report for file in files)
        self.shares = tuple(Share(len(file.examples), weight) for file, weight in zip(files, weights, strict=True))
        self.stop_ids = stop_ids
        self.digest = key_of([file.digest for file in files])
        self._stores = [file.examples for file in files]
        self._length = sum(map(len, self._stores))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Example:
        store, row = self._find(index)
        return Example(index, *store.prompt_and_response(row))

    @property
    def longest(self) -> int:
        """Most tokens that prompt and response of an example may have: no more than `max_seq_length`."""
        return max(min(report.longest, report.max_seq_length) for report in self.reports)

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def given_rejected(self, index: int) -> tuple[int, ...] | None:
        """The rejected response that came with the example's record, in token ids; None where there is none.

        Prompt and response are at most `max_seq_length` long, so that it may have been cut off: then it has no stop
        token at its end, like a generated one.
        """
        store, row = self._find(index)
        return store.rejected(row)

    @property
    def num_given_rejected(self) -> int:
        """Number of examples for which `given_rejected` is not None."""
        return sum(store.num_rejected for store in self._stores)

    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """Number of tokens of every prompt and of every response, its stop token included: int32 [len] each."""
        prompts, responses = zip(*(store.lengths() for store in self._stores), strict=True)
        return np.concatenate(prompts), np.concatenate(responses)

    def place(self, index: int) -> tuple[int, int]:
        """The number of the example's file, from 0, and its own number among that file's examples, from 0."""
        row = index
        for number, store in enumerate(self._stores):
            if 0 <= row < len(store):
                return number, row
            row -= len(store)
        raise IndexError(f"example {index} of {self._length}")

    def _find(self, index: int) -> tuple[ExampleStore, int]:
        number, row = self.place(index)
        return self._stores[number], row


def load_dataset(
    cfg: DatasetConfig, tokenizer: TextTokenizer, max_seq_length: int, *, refuse: bool = True
) -> SFTDataset:
    """Read and tokenize files, or open what an earlier call has made of them; the formats are those of `formats`.

    Args:
        cfg: the files, see `records.read_records` for their kinds, and how their records become tokens.
        max_seq_length: most tokens of prompt and response together, in place of `cfg.max_seq_length`. A prompt must
            leave room for one generated token.
        refuse: False to take what can be used and leave out the rest, whatever `overlong` and `on_bad_record` say; then
            the reports tell it all, and `LoadReport.refuse` raises what would be raised here.

    Raises ConfigError for an option that cannot be used, DataError for a file or record that cannot.
    """
    _check_options(cfg)
    truncate = cfg.overlong == "truncate"
    options: dict[str, Any] = {
        "prompt_template": cfg.prompt_template,
        "label_key": cfg.label_key,
        "add_bos": cfg.add_bos,
        "add_eos": cfg.add_eos,
        "chat_prompt_tokens": cfg.chat_prompt_tokens,
        "truncation_field": cfg.truncation_field if truncate else None,
        "truncation_method": cfg.truncation_method,
    }
    encoder = RecordEncoder(tokenizer, **options)
    options |= {"chat_prompt_tokens": asdict(cfg.chat_prompt_tokens), "max_seq_length": max_seq_length}
    skip = cfg.on_bad_record == "skip" or not refuse
    files = []
    for path in cfg.file_path:
        key = key_of(_VERSION, tokenizer.fingerprint, identity_of(path), options)
        file = open_or_make(
            cfg.cache_dir,
            key,
            lambda directory, path=path: _tokenize(path, encoder, max_seq_length, truncate, skip, directory),
            _open,
        )
        file.report.path = str(path)
        if refuse:
            file.report.refuse(cfg.overlong, cfg.on_bad_record)
        files.append(file)
    kinds = {kind for file in files for kind in file.report.formats}
    return SFTDataset(files, cfg.weights or [1.0] * len(files), encoder.stop_ids(kinds))


def _check_options(cfg: DatasetConfig) -> None:
    weights, num_files = cfg.weights, len(cfg.file_path)
    if cfg.overlong not in OVERLONG:
        raise ConfigError(f"overlong is {cfg.overlong!r}: use refuse, drop or truncate")
    if cfg.on_bad_record not in ON_BAD_RECORD:
        raise ConfigError(f"on_bad_record is {cfg.on_bad_record!r}: use error or skip")
    if cfg.overlong == "truncate" and not cfg.truncation_field:
        raise ConfigError("overlong: truncate needs a truncation_field, the field of prompt_template that may be cut")
    if not num_files:
        raise ConfigError("file_path names no file: name at least one")
    if weights is not None and (len(weights) != num_files or not all(weight > 0 for weight in weights)):
        raise ConfigError(f"weights are {list(weights)}: give a number above 0 for each of the {num_files} files")


def _tokenize(
    path: str | PathLike[str],
    encoder: RecordEncoder,
    max_seq_length: int,
    truncate: bool,
    skip: bool,
    directory: Path,
) -> None:
    """Write a file's examples that fit, and its report, into a cache entry's directory."""
    report = LoadReport(str(path), max_seq_length)

    def skip_record(where: str, error: DataError) -> None:
        report.skip(where, place_of(where, path), error)

    records = read_records(path, skip_record if skip else None)
    bar = tqdm(records, desc=f"Tokenizing {Path(path).name}", unit=" records", delay=2, leave=False, disable=None)
    with ExampleWriter(directory / _EXAMPLES) as writer:
        for where, record in bar:
            try:
                encoded = encoder.encode(record, where, max_seq_length if truncate else None)
            except DataError as error:
                if not skip:
                    raise
                skip_record(where, error)
                continue
            room = max_seq_length - len(encoded.prompt_ids)
            length = len(encoded.prompt_ids) + len(encoded.response_ids)
            report.read += 1
            report.longest = max(report.longest, length + encoded.cut)
            if length > max_seq_length:
                report.dropped.add(place_of(where, path))
                report.dropped_prompt += room <= 0
                continue
            rejected = encoded.rejected_ids
            if rejected is not None and len(rejected) > room:
                rejected = rejected[:room]
                report.cut_rejected += 1
            if encoded.cut:
                report.truncated.add(place_of(where, path))
            report.formats[encoded.kind] = report.formats.get(encoded.kind, 0) + 1
            writer.append(encoded.prompt_ids, encoded.response_ids, rejected)
    size = (directory / _EXAMPLES).stat().st_size
    stored = {"bytes": size, "digest": writer.digest, "report": report.to_json()}
    (directory / _REPORT).write_text(json.dumps(stored, indent=1), encoding="utf-8")


def _open(directory: Path) -> TokenizedFile:
    """A cache entry. Raises UnusableEntryError unless it is whole."""
    try:
        stored = json.loads((directory / _REPORT).read_text(encoding="utf-8"))
        report = LoadReport.from_json(stored["report"])
        digest = str(stored["digest"])
        if (directory / _EXAMPLES).stat().st_size != stored["bytes"]:
            raise UnusableEntryError
        examples = ExampleStore(directory / _EXAMPLES)
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnusableEntryError from error
    if len(examples) != report.kept:
        raise UnusableEntryError
    return TokenizedFile(examples, report, digest)
