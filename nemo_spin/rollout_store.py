"""Keeping the rollouts of an iteration: made once, in Parquet files that people can open, used in every epoch."""

from __future__ import annotations

import math
import os
import shutil
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pyarrow as pa
import pyarrow.parquet as pq
import torch.distributed as dist

from nemo_spin.pairs import Example, Pair
from nemo_spin.rollouts import Rollout

SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
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


# A response of at least this many tokens counts as repeated when less than half of its runs of four tokens differ.
_REPEATED_FROM_TOKENS = 16
_RUN = 4


class Dataset(Protocol):
    def __getitem__(self, index: int) -> Example: ...


@dataclass(frozen=True, slots=True)
class Sample:
    """A rollout for people: texts of the prompt, the human response and the generated one."""

    index: int
    prompt: str
    chosen: str
    rejected: str
    finish_reason: str


class RolloutStore:
    """The rollouts of one iteration: in memory on every process, on disk for people and for resuming.

    directory: one Parquet file (schema `SCHEMA`) for each time rollouts were added; only process 0 writes.
    decode: token ids -> text, for the columns that people read.
    """

    def __init__(self, directory: Path, decode: Callable[[Sequence[int]], str]) -> None:
        self.directory = directory
        self._decode = decode
        # Flat: 4 bytes a token. Row r holds ids[starts[r]:starts[r + 1]], and the logps 2r (chosen) and 2r + 1.
        self._row_of: dict[int, int] = {}
        self._ids, self._starts, self._ref_logps = array("i"), array("q", [0]), array("d")
        self._cut_off = bytearray()
        self._empty = self._repeated = self._matching = self._not_finite = 0
        self._finite_logps, self._finite_tokens = 0.0, 0

    def __len__(self) -> int:
        return len(self._row_of)

    def missing(self, indices: Iterable[int]) -> list[int]:
        """Those of the examples' indices that have no rollout yet, each once, in ascending order."""
        return sorted({index for index in indices if index not in self._row_of})

    def pair(self, example: Example) -> Pair:
        """The example with its rollout. Raises KeyError if it has none."""
        row = self._row_of[example.index]
        chosen, rejected = self._ref_logps[2 * row : 2 * row + 2]
        ids = tuple(self._ids[self._starts[row] : self._starts[row + 1]])
        return Pair(example, ids, "length" if self._cut_off[row] else "stop", chosen, rejected)

    def add(self, examples: Sequence[Example], rollouts: Sequence[Rollout]) -> None:
        """Keep the rollouts of these examples, and write them to the next file of the directory."""
        if dist.get_rank() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            if not len(self):
                self._remove_files()
            path = self.directory / f"part-{len(self.files()):05d}.parquet"
            unfinished = path.with_suffix(".tmp")
            try:
                pq.write_table(self._table(examples, rollouts), unfinished)
                os.replace(unfinished, path)
            finally:
                unfinished.unlink(missing_ok=True)
        for example, rollout in zip(examples, rollouts, strict=True):
            self._keep(rollout, example.response_ids)

    def files(self) -> list[Path]:
        return sorted(self.directory.glob("part-*.parquet"))

    def restore(self, files: Sequence[Path]) -> None:
        """Begin with the rollouts in these files; what the directory held before is removed."""
        if dist.get_rank() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._remove_files()
            for path in files:
                shutil.copyfile(path, self.directory / path.name)
        columns = ["index", "rejected_ids", "finish_reason", "ref_chosen_logps", "ref_rejected_logps"]
        for path in files:
            for row in pq.read_table(path, columns=[*columns, "chosen_ids"]).to_pylist():
                chosen_ids = tuple(row.pop("chosen_ids"))
                row["rejected_ids"] = array("i", row["rejected_ids"])
                self._keep(Rollout(**row), chosen_ids)

    def _keep(self, rollout: Rollout, chosen_ids: tuple[int, ...]) -> None:
        self._row_of[rollout.index] = len(self._cut_off)
        self._ids.extend(rollout.rejected_ids)
        self._starts.append(len(self._ids))
        self._ref_logps.extend((rollout.ref_chosen_logps, rollout.ref_rejected_logps))
        self._cut_off.append(rollout.finish_reason == "length")
        # a stop token alone says nothing
        self._empty += len(rollout.rejected_ids) == 1 and rollout.finish_reason == "stop"
        self._repeated += is_repeated(rollout.rejected_ids)
        self._matching += tuple(rollout.rejected_ids) == chosen_ids
        if math.isfinite(rollout.ref_chosen_logps) and math.isfinite(rollout.ref_rejected_logps):
            self._finite_logps += rollout.ref_rejected_logps
            self._finite_tokens += len(rollout.rejected_ids)
        else:
            self._not_finite += 1

    def _remove_files(self) -> None:
        for path in self.files():
            path.unlink()

    def summary(self) -> dict[str, float]:
        """`rollout/*`: number of responses, mean tokens, and shares of them: ended by a stop token, cut off at the
        length limit, empty, repeated (see `is_repeated`), equal to the human response, of pairs whose log-probabilities
        are not finite; and `entropy`, minus the mean log-probability of a token under the reference, in nats."""
        count = max(len(self), 1)
        cut_off = sum(self._cut_off)
        shares = {
            "finish_reason_stop": len(self) - cut_off,
            "finish_reason_length": cut_off,
            "empty": self._empty,
            "repeated": self._repeated,
            "exact_match": self._matching,
            "not_finite": self._not_finite,
        }
        entropy = {"rollout/entropy": -self._finite_logps / self._finite_tokens} if self._finite_tokens else {}
        return {
            "rollout/responses": float(len(self)),
            "rollout/length": len(self._ids) / count,
            **entropy,
            **{f"rollout/{name}": number / count for name, number in shares.items()},
        }

    @property
    def num_tokens(self) -> int:
        """Tokens of all responses."""
        return len(self._ids)

    def samples(self, dataset: Dataset, count: int) -> list[Sample]:
        """The first `count` by index, as text; of the same examples in every iteration that uses all of them."""
        pairs = [self.pair(dataset[index]) for index in sorted(self._row_of)[:count]]
        return [
            Sample(
                pair.example.index,
                self._decode(pair.example.prompt_ids),
                self._decode(pair.example.response_ids),
                self._decode(pair.rejected_ids),
                pair.finish_reason,
            )
            for pair in pairs
        ]

    def _table(self, examples: Sequence[Example], rollouts: Sequence[Rollout]) -> pa.Table:
        rows = [
            {
                "index": rollout.index,
                "prompt": self._decode(example.prompt_ids),
                "chosen": self._decode(example.response_ids),
                "rejected": self._decode(rollout.rejected_ids),
                "prompt_ids": example.prompt_ids,
                "chosen_ids": example.response_ids,
                "rejected_ids": rollout.rejected_ids,
                "prompt_length": len(example.prompt_ids),
                "chosen_length": len(example.response_ids),
                "rejected_length": len(rollout.rejected_ids),
                "finish_reason": rollout.finish_reason,
                "ref_chosen_logps": rollout.ref_chosen_logps,
                "ref_rejected_logps": rollout.ref_rejected_logps,
            }
            for example, rollout in zip(examples, rollouts, strict=True)
        ]
        return pa.Table.from_pylist(rows, schema=SCHEMA)


def is_repeated(ids: Sequence[int]) -> bool:
    """Whether a response goes round in circles: less than half of its runs of four tokens are different ones."""
    if len(ids) < _REPEATED_FROM_TOKENS:
        return False
    runs = [tuple(ids[i : i + _RUN]) for i in range(len(ids) - _RUN + 1)]
    return 2 * len(set(runs)) < len(runs)
