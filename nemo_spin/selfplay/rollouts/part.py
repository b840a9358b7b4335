"""A Parquet file of rollouts: for people to read, and for a run that goes on to find its rollouts again."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nemo_spin.selfplay.rollouts.roll_out import Rollout

SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("sample", pa.int32()),
        ("prompt", pa.string()),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("chosen_ids", pa.list_(pa.int32())),
        ("rejected_ids", pa.list_(pa.int32())),
        ("prompt_length", pa.int32()),
        ("chosen_length", pa.int32()),
        ("rejected_length", pa.int32()),
        ("finish_reason", pa.string()),
        ("ref_chosen_logps", pa.float64()),
        ("ref_rejected_logps", pa.float64()),
    ]
)

_COLUMNS = ["index", "sample", "rejected_ids", "finish_reason", "ref_chosen_logps", "ref_rejected_logps"]
# Names in the file's metadata.
_REFERENCE, _SETTINGS, _ROWS = b"nemo_spin.ref_id", b"nemo_spin.settings", b"nemo_spin.rows"


@dataclass(frozen=True, slots=True)
class Origin:
    """What rollouts are a function of: those of the same origin and index are the same, up to rounding.

    ref_id: names the weights of the reference that made them. settings: a hash of all else.
    """

    ref_id: str
    settings: str


class UnreadableError(Exception):
    """A file that is damaged, or none of ours."""


class ForeignError(Exception):
    """A file of another origin."""


@dataclass(frozen=True, slots=True)
class Part:
    """What a file holds. digest: of the rollouts, the same for a copy."""

    rollouts: list[Rollout]
    digest: str


def write_part(path: Path, rows: Sequence[dict], rollouts: Sequence[Rollout], origin: Origin) -> None:
    """Write a file that is on disk, and whole, when it has its name. rows: as `SCHEMA` has them, one for each rollout.

    Raises OSError; then there is no file.
    """
    names = {_REFERENCE: origin.ref_id, _SETTINGS: origin.settings, _ROWS: digest_of(rollouts)}
    unfinished = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "wb") as file:
            pq.write_table(pa.Table.from_pylist(list(rows), schema=SCHEMA.with_metadata(names)), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_part(path: Path, origin: Origin | None = None) -> Part:
    """The rollouts of a file. origin: what they have to come from, None for wherever they come from.

    Raises UnreadableError unless they are what was written, ForeignError if they are of another origin.
    """
    try:
        with pq.ParquetFile(path) as parquet:
            names = parquet.schema_arrow.metadata or {}
            if origin is not None and names.get(_ROWS) is None:
                raise ForeignError
            if origin is not None and (names.get(_REFERENCE), names.get(_SETTINGS)) != (
                origin.ref_id.encode(),
                origin.settings.encode(),
            ):
                raise ForeignError
            rows = parquet.read(columns=_COLUMNS).to_pylist()
        rollouts = [Rollout(**row | {"rejected_ids": array("i", row["rejected_ids"])}) for row in rows]
        digest = digest_of(rollouts)
    except (OSError, pa.ArrowException, ValueError, TypeError, KeyError, OverflowError) as error:
        raise UnreadableError from error
    # Parquet itself would not notice a flipped bit.
    if names.get(_ROWS, digest.encode()) != digest.encode():
        raise UnreadableError
    return Part(rollouts, digest)


def origin_of(path: Path) -> Origin:
    """What the rollouts of a file come from. Raises UnreadableError."""
    try:
        with pq.ParquetFile(path) as parquet:
            names = parquet.schema_arrow.metadata or {}
            return Origin(names[_REFERENCE].decode(), names[_SETTINGS].decode())
    except (OSError, pa.ArrowException, KeyError, UnicodeDecodeError) as error:
        raise UnreadableError from error


def digest_of(rollouts: Sequence[Rollout]) -> str:
    """A hash of all that rollouts are made of, to the last bit."""
    digest = hashlib.sha256()
    for rollout in rollouts:
        numbers = array("d", (rollout.ref_chosen_logps, rollout.ref_rejected_logps))
        # Files of before there were several responses to a prompt do not number them.
        name = f"{rollout.index}.{rollout.sample}" if rollout.sample else f"{rollout.index}"
        digest.update(f"{name} {rollout.finish_reason} {len(rollout.rejected_ids)} ".encode())
        digest.update(rollout.rejected_ids.tobytes() + numbers.tobytes())
    return digest.hexdigest()
