"""A Parquet file of rollouts: for people to read, and for a resumed run to take its rollouts from."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nemo_spin.data.example import Example
from nemo_spin.generation.interface import Response
from nemo_spin.selfplay.pairs import Rollout

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

# Those that a rollout is read from.
_COLUMNS = ["index", "sample", "rejected_ids", "finish_reason", "ref_chosen_logps", "ref_rejected_logps"]
# Names in the file's metadata.
_REFERENCE, _SETTINGS, _ROWS = b"nemo_spin.ref_id", b"nemo_spin.settings", b"nemo_spin.rows"


@dataclass(frozen=True, slots=True)
class Origin:
    """What rollouts depend on: those of the same origin and index are the same, up to rounding.

    ref_id: identifies the weights of the reference that made them. settings: a hash of everything else.
    """

    ref_id: str
    settings: str


class UnreadableError(Exception):
    """The file is damaged, or was not written by this package."""


class ForeignError(Exception):
    """The file is of another origin."""


@dataclass(frozen=True, slots=True)
class Part:
    """The content of a file. digest: of the rollouts, the same for a copy."""

    rollouts: list[Rollout]
    digest: str


def row_of(rollout: Rollout, example: Example, decode: Callable[[Sequence[int]], str]) -> dict[str, Any]:
    """The row of a rollout as in `SCHEMA`: with texts, ids and lengths. decode: token ids -> text."""
    response = rollout.response
    return {
        "index": response.index,
        "sample": response.sample,
        "prompt": decode(example.prompt_ids),
        "chosen": decode(example.response_ids),
        "rejected": decode(response.ids),
        "prompt_ids": example.prompt_ids,
        "chosen_ids": example.response_ids,
        "rejected_ids": response.ids,
        "prompt_length": len(example.prompt_ids),
        "chosen_length": len(example.response_ids),
        "rejected_length": len(response.ids),
        "finish_reason": response.finish_reason,
        "ref_chosen_logps": rollout.ref_chosen_logps,
        "ref_rejected_logps": rollout.ref_rejected_logps,
    }


def write_part(path: Path, rows: Sequence[dict], rollouts: Sequence[Rollout], origin: Origin) -> None:
    """Write a file that has its name only when it is complete and on disk. rows: the `row_of` each rollout.

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
    """The rollouts of a file. origin: the one they must have; None for any.

    Raises UnreadableError unless they are exactly what was written, ForeignError if they are of another origin.
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
        rollouts = [_rollout(row) for row in rows]
        digest = digest_of(rollouts)
    except (OSError, pa.ArrowException, ValueError, TypeError, KeyError, OverflowError) as error:
        raise UnreadableError from error
    # Parquet itself would not notice a flipped bit.
    if names.get(_ROWS, digest.encode()) != digest.encode():
        raise UnreadableError
    return Part(rollouts, digest)


def origin_of(path: Path) -> Origin:
    """The origin of the rollouts in a file. Raises UnreadableError."""
    try:
        with pq.ParquetFile(path) as parquet:
            names = parquet.schema_arrow.metadata or {}
            return Origin(names[_REFERENCE].decode(), names[_SETTINGS].decode())
    except (OSError, pa.ArrowException, KeyError, UnicodeDecodeError) as error:
        raise UnreadableError from error


def digest_of(rollouts: Sequence[Rollout]) -> str:
    """A hash of rollouts, to the last bit."""
    digest = hashlib.sha256()
    for rollout in rollouts:
        numbers = array("d", (rollout.ref_chosen_logps, rollout.ref_rejected_logps))
        response = rollout.response
        # Files from before a prompt could have several responses do not number them.
        name = f"{response.index}.{response.sample}" if response.sample else f"{response.index}"
        digest.update(f"{name} {response.finish_reason} {len(response.ids)} ".encode())
        digest.update(response.ids.tobytes() + numbers.tobytes())
    return digest.hexdigest()


def _rollout(row: dict[str, Any]) -> Rollout:
    response = Response(row["index"], array("i", row["rejected_ids"]), row["finish_reason"], row.get("sample", 0))
    return Rollout(response, row["ref_chosen_logps"], row["ref_rejected_logps"])
