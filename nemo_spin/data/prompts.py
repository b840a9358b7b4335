"""Reading prompts for generation: the records of a data file, with or without responses, each known by its id."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass
from os import PathLike
from reprlib import repr as shortened
from typing import Any

from nemo_spin.data.encoder import RecordEncoder
from nemo_spin.data.load_report import LoadReport
from nemo_spin.data.records import place_of, read_records
from nemo_spin.data.values import kind_of, text_of
from nemo_spin.errors import DataError


@dataclass(frozen=True, slots=True)
class Prompt:
    """index: its position among the prompts, from 0: what training calls the index of an example.

    id: the record's own, or its index. ids: int32 token ids, at least one.
    """

    index: int
    id: str | int | float
    ids: array


def read_prompts(
    path: str | PathLike[str], encoder: RecordEncoder, max_seq_length: int, on_bad_record: str = "error"
) -> tuple[list[Prompt], LoadReport]:
    """All prompts of a file, and what became of its records; for the formats see `RecordEncoder.encode_prompt`.

    max_seq_length: tokens of prompt and response; a prompt has to leave room for one token.
    on_bad_record: "error", or "skip" records that cannot be used. Those have no index, as in training.

    Raises DataError that begins with file and line, also for an id that occurs twice.
    """
    report = LoadReport(str(path), max_seq_length)

    def skip(where: str, error: DataError) -> None:
        report.skip(where, place_of(where, path), error)

    prompts: list[Prompt] = []
    places: dict[str | int | float, str] = {}
    for where, record in read_records(path, skip if on_bad_record == "skip" else None):
        try:
            ids = encoder.encode_prompt(record, where)
            if len(ids) >= max_seq_length:
                raise DataError(
                    f"{where}: the prompt leaves no room for a response: it has {len(ids)} tokens, and the model takes "
                    f"{max_seq_length} for both: shorten it"
                )
            prompt = Prompt(len(prompts), _id_of(record, len(prompts), where), array("i", ids))
            if prompt.id in places:
                raise DataError(
                    f"{where}: the id is that of {place_of(places[prompt.id], path)} ({shortened(prompt.id)}): give "
                    "every record an 'id' of its own, or none to all"
                )
        except DataError as error:
            if on_bad_record != "skip":
                raise
            skip(where, error)
            continue
        places[prompt.id] = where
        prompts.append(prompt)
        report.read += 1
        kind = encoder.kind(record)
        report.formats[kind] = report.formats.get(kind, 0) + 1
        report.longest = max(report.longest, len(ids))
    report.refuse(overlong="drop", on_bad_record=on_bad_record)
    return prompts, report


def _id_of(record: dict[str, Any], index: int, where: str) -> str | int | float:
    value = record.get("id")
    if value is None:
        return index
    if isinstance(value, str):
        return text_of(value, "'id'", where)
    if type(value) is int or (isinstance(value, float) and math.isfinite(value)):
        return value
    found = shortened(value) if isinstance(value, float) else kind_of(value)
    raise DataError(f"{where}: 'id' must be a string or a number, found {found}: change or remove it")
