"""What became of a data file's records: counts, and the places of what cannot be used."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from nemo_spin.errors import DataError

PLACES_SHOWN = 5
_REASONS_KEPT = 50


@dataclass(slots=True)
class Noted:
    """Records that share a fate. count: of them. places: of the first few, as in `records.place_of`."""

    count: int = 0
    places: list[str] = field(default_factory=list)

    def add(self, place: str) -> None:
        self.count += 1
        if len(self.places) < PLACES_SHOWN:
            self.places.append(place)

    def where(self) -> str:
        """The places in words: "line 2, 4, ...", or with "row" for "line"."""
        words = [place.split(" ", 1) for place in self.places]
        numbers = ", ".join(number for _, number in words)
        return f"{words[0][0]} {numbers}" + ", ..." * (self.count > len(self.places)) if words else ""


@dataclass(slots=True)
class LoadReport:
    """What became of a file's records. `str()` says it in one line.

    read: records that were understood. formats: kind of record -> how many were kept.
    longest: length of the longest of them, in tokens, before anything was cut.
    dropped: longer than `max_seq_length`; dropped_prompt: of these, because the prompt alone leaves no room for a
        generated token.
    truncated: cut to `max_seq_length` in the fields that may be cut.
    cut_rejected: number of given rejected responses that were cut off at `max_seq_length`.
    skipped: reason -> records that cannot be used for it. first_error: what is wrong with the first of these, after the
        path, which may be spelt otherwise when the report is read again.
    """

    path: str
    max_seq_length: int
    read: int = 0
    longest: int = 0
    formats: dict[str, int] = field(default_factory=dict)
    dropped: Noted = field(default_factory=Noted)
    dropped_prompt: int = 0
    truncated: Noted = field(default_factory=Noted)
    cut_rejected: int = 0
    skipped: dict[str, Noted] = field(default_factory=dict)
    first_error: str | None = None

    @property
    def kept(self) -> int:
        return self.read - self.dropped.count

    @property
    def skipped_count(self) -> int:
        return sum(noted.count for noted in self.skipped.values())

    def skip(self, where: str, place: str, error: DataError) -> None:
        """Note a record that cannot be used."""
        sentence = str(error)
        # as they stand in a sentence, which is safe for a terminal
        path, where = str(DataError(self.path)), str(DataError(f"{where}: "))
        self.first_error = self.first_error or sentence.removeprefix(path)
        reason = reason_of(sentence.removeprefix(where))
        if reason not in self.skipped and len(self.skipped) >= _REASONS_KEPT:
            reason = "other reasons"
        self.skipped.setdefault(reason, Noted()).add(place)

    def refuse(self, overlong: str, on_bad_record: str) -> None:
        """Raise DataError if there is what the user does not want to be left out, or if nothing is left."""
        if on_bad_record == "error" and self.first_error is not None:
            raise DataError(f"{self.path}{self.first_error}")
        if self.dropped.count and overlong != "drop":
            remedy = (
                "raise max_seq_length as far as the model goes, or set overlong: drop"
                if overlong == "refuse"
                else "what truncation_field names is not enough to cut: shorten them, or set overlong: drop"
            )
            raise DataError(
                f"{self.path}: {self.dropped.count} of {self.read} examples are longer than max_seq_length = "
                f"{self.max_seq_length} tokens ({self.dropped_prompt} by their prompt alone), at "
                f"{self.dropped.where()}, the longest {self.longest}: {remedy}"
            )
        if not self.read:
            raise DataError(
                f"{self.path}: none of its {self.skipped_count} records can be used, the first because of this: "
                f"{self.path}{self.first_error}"
            )
        if not self.kept:
            raise DataError(
                f"{self.path}: all {self.read} examples are longer than max_seq_length = {self.max_seq_length} tokens, "
                f"the longest {self.longest}: raise max_seq_length or shorten the data"
            )

    def losses(self) -> Iterator[str]:
        """What was left out or cut, and where, a clause each."""
        if self.dropped.count:
            with_response = self.dropped.count - self.dropped_prompt
            yield (
                f"dropped {self.dropped.count} longer than {self.max_seq_length} tokens ({self.dropped_prompt} by "
                f"their prompt alone, {with_response} with their response; {self.dropped.where()})"
            )
        if self.truncated.count:
            yield f"cut {self.truncated.count} to {self.max_seq_length} tokens ({self.truncated.where()})"
        if self.cut_rejected:
            yield f"cut {self.cut_rejected} of the given rejected responses"
        for reason, noted in self.skipped.items():
            yield f"skipped {noted.count}: {reason} ({noted.where()})"

    def __str__(self) -> str:
        kept = f", kept {self.kept}" if self.dropped.count else ""
        return "; ".join(
            [f"{self.path}: read {self.read} examples{kept}, longest {self.longest} tokens", *self.losses()]
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> LoadReport:
        """The inverse of `to_json`. Raises TypeError, KeyError or AttributeError for something else."""
        values = values | {name: Noted(**values[name]) for name in ("dropped", "truncated")}
        values["skipped"] = {reason: Noted(**noted) for reason, noted in values["skipped"].items()}
        return cls(**values)


def reason_of(message: str) -> str:
    """What errors that differ only in their details have in common, so that they can be counted together."""
    return re.sub(r"(?<!UTF-)\d+", "N", re.split(r"[:(;]", message)[0]).strip()
