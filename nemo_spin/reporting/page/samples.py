"""The same few prompts in the rollouts of every iteration, for people to read side by side."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nemo_spin.errors import DataError

COLUMNS = ("index", "prompt", "chosen", "rejected", "finish_reason", "chosen_length", "rejected_length")
_NUMBER_SHOWN = 5
# Prompts are chosen among the first of a file: rows are read from its beginning, so that little is read.
_CANDIDATES = 1000
_BATCH_ROWS = 256

Files = dict[Path, np.ndarray]  # the files of an iteration with the indices in their rows, [rows] int64


@dataclass(frozen=True, slots=True)
class Response:
    """What an iteration's reference answered. length: tokens. finish_reason: stop or length."""

    iteration: int
    text: str
    finish_reason: str
    length: int


@dataclass(slots=True)
class Sample:
    """A prompt with its human answer (of `chosen_length` tokens) and the generated ones."""

    index: int
    prompt: str
    chosen: str
    chosen_length: int
    responses: list[Response] = field(default_factory=list)


def read_samples(run_dir: Path, iterations: list[int]) -> list[Sample]:
    """A few prompts that all of the iterations answered, in the order of their index.

    An iteration that has none of the first one's prompts is left out, as is one without rollouts.
    Raises DataError for a file that cannot be read.
    """
    indices: dict[int, Files] = {}
    for iteration in iterations:
        files = sorted((run_dir / "rollouts" / f"iteration-{iteration:03d}").glob("part-*.parquet"))
        if files:
            indices[iteration] = {file: _indices(file) for file in files}
    wanted = _chosen(list(indices.values()))
    samples: dict[int, Sample] = {}
    for iteration, files_of_iteration in indices.items():
        for index, values in _read(wanted, files_of_iteration).items():
            sample = samples.setdefault(
                index, Sample(index, values["prompt"], values["chosen"], values["chosen_length"])
            )
            sample.responses.append(
                Response(iteration, values["rejected"], values["finish_reason"], values["rejected_length"])
            )
    return [samples[index] for index in sorted(samples)]


def _chosen(iterations: list[Files]) -> np.ndarray:
    """Indices that are spread over the candidates which all iterations have."""
    if not iterations:
        return np.empty(0, dtype=np.int64)
    # An index comes as often as there are responses to its prompt, of which the first one is shown.
    candidates = np.unique(next(iter(iterations[0].values()))[:_CANDIDATES])
    for files in iterations[1:]:
        common = candidates[np.isin(candidates, np.concatenate(list(files.values())))]
        candidates = common if len(common) else candidates
    count = min(_NUMBER_SHOWN, len(candidates))
    return candidates[np.arange(count) * len(candidates) // max(count, 1)]


def _indices(file: Path) -> np.ndarray:
    try:
        with pq.ParquetFile(file) as parquet:
            missing = [column for column in COLUMNS if column not in parquet.schema_arrow.names]
            if missing:
                raise DataError(f"{file} lacks the column {missing[0]}: it is not a file of rollouts, move it away.")
            return parquet.read(columns=["index"])["index"].to_numpy()
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(file, error) from None


def _read(wanted: np.ndarray, files: Files) -> dict[int, dict[str, Any]]:
    """The rows with these indices, by index; no more of a file is read than up to the last of them."""
    found: dict[int, dict[str, Any]] = {}
    for file, indices in files.items():
        left = int(np.isin(indices, wanted).sum())
        try:
            with pq.ParquetFile(file) as parquet:
                batches = parquet.iter_batches(batch_size=_BATCH_ROWS, columns=list(COLUMNS))
                while left:
                    batch = next(batches)
                    rows = batch.filter(pc.is_in(batch["index"], value_set=pa.array(wanted)))
                    for values in rows.to_pylist():
                        found.setdefault(values["index"], values)
                    left -= len(rows)
        except (OSError, pa.ArrowException) as error:
            raise _unreadable(file, error) from None
    return found


def _unreadable(file: Path, error: Exception) -> DataError:
    reason = " ".join(str(error).split())
    return DataError(f"{file} cannot be read as Parquet ({reason}): move it away for a report without it.")
