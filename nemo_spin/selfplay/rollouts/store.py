"""Keeping the rollouts of an iteration: made once, in Parquet files that people can open, used in every epoch."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from megatron.core import parallel_state

from nemo_spin.data.example import Example
from nemo_spin.reporting.events import Sample
from nemo_spin.runtime.collectives import from_first, of_first
from nemo_spin.selfplay.pairs import Pair, Selection
from nemo_spin.selfplay.rollouts.directory import Found, RolloutDirectory
from nemo_spin.selfplay.rollouts.journal import Journal
from nemo_spin.selfplay.rollouts.part import Origin, origin_of
from nemo_spin.selfplay.rollouts.roll_out import Answer, Key, Rollout

# A response of at least this many tokens counts as repeated when less than half of its runs of four tokens differ.
_REPEATED_FROM_TOKENS = 16
_RUN = 4


class Dataset(Protocol):
    def __getitem__(self, index: int) -> Example: ...


class RolloutStore:
    """The rollouts of one iteration: in memory on every process, on disk for people and for a run that goes on.

    Every process calls every method; only process 0 writes, beside one journal for each data-parallel replica.

    responses: those without log-probabilities yet; in the end those that an interruption has left.
    """

    def __init__(
        self,
        directory: Path,
        origin: Origin,
        dataset: Dataset,
        decode: Callable[[Sequence[int]], str],
        num_generations: int = 1,
        selection: Selection | None = None,
    ) -> None:
        """directory: the same on every process and visible to all of them. origin: of the rollouts.

        decode: token ids -> text, for the columns that people read. num_generations: responses to each prompt.
        selection: which of them make pairs; None for all.
        """
        self._directory = RolloutDirectory(directory, origin, self._row)
        self._samples, self._selection = range(num_generations), selection or Selection()
        self.responses: dict[Key, Answer] = {}
        self._dataset, self._decode = dataset, decode
        self._journals = 0
        # Flat: 4 bytes a token. Row r holds ids[starts[r]:starts[r + 1]], and the logps 2r (chosen) and 2r + 1.
        self._row_of: dict[Key, int] = {}
        self._ids, self._starts, self._ref_logps = array("i"), array("q", [0]), array("d")
        self._cut_off = bytearray()
        self._empty = self._repeated = self._matching = self._not_finite = 0
        self._finite_logps, self._finite_tokens = 0.0, 0

    @classmethod
    def recalled(cls, directory: Path, files: Sequence[Path], *args: Any) -> RolloutStore:
        """The rollouts of an iteration that has ended, as a checkpoint holds them. files: the checkpoint's. args: those
        of the constructor after `origin`, which the files say themselves."""
        origin = of_first(lambda: origin_of(files[0]) if files else Origin("", ""))
        store = cls(directory, origin, *args)
        store.find(files)
        return store

    @property
    def path(self) -> Path:
        """The directory."""
        return self._directory.path

    @property
    def origin(self) -> Origin:
        """What its rollouts come from."""
        return self._directory.origin

    def __len__(self) -> int:
        return len(self._row_of)

    def missing(self, indices: Iterable[int]) -> list[int]:
        """Those of the examples' indices that lack a rollout, each once, in ascending order."""
        return sorted({i for i in indices if any((i, sample) not in self._row_of for sample in self._samples)})

    def pair(self, example: Example, number: int = 0) -> Pair:
        """The example with the rollout of this number among those that make pairs. Raises KeyError if it has none."""
        return self._pair(example, self._selected(example.index)[number])

    def answers(self, index: int) -> list[Answer]:
        """The responses to an example that make pairs, in the order of `pair`. Raises KeyError if one is missing."""
        rows = [self._row_of[index, sample] for sample in self._selected(index)]
        return [Answer(self._row_ids(row), self._finish_reason(row)) for row in rows]

    def _selected(self, index: int) -> list[int]:
        rows = [self._row_of[index, sample] for sample in self._samples]
        return self._selection(
            [self._ref_logps[2 * row + 1] for row in rows], [self._starts[row + 1] - self._starts[row] for row in rows]
        )

    def _pair(self, example: Example, sample: int) -> Pair:
        row = self._row_of[example.index, sample]
        chosen, rejected = self._ref_logps[2 * row : 2 * row + 2]
        return Pair(example, tuple(self._row_ids(row)), self._finish_reason(row), chosen, rejected)

    def _row_ids(self, row: int) -> array:
        return self._ids[self._starts[row] : self._starts[row + 1]]

    def _finish_reason(self, row: int) -> str:
        return "length" if self._cut_off[row] else "stop"

    # ------------------------------------------------------------------------------------------ on disk

    def find(self, checkpointed: Sequence[Path] = (), trusted: bool = True) -> Found:
        """Take what the directory and a checkpoint hold of this origin, the same on every process.

        checkpointed, trusted: see `RolloutDirectory.read_parts`. Process 0 alone reads: what another machine wrote
        last may be seen late, and not by all at once.
        """
        disk = self._directory
        if dist.get_rank() == 0:
            for rollouts in disk.read_parts(checkpointed, trusted):
                self._keep(from_first(rollouts))
            from_first([])
            shared = from_first((disk.read_journals(), disk.life, disk.found))
        else:
            while rollouts := from_first(None):
                self._keep(rollouts)
            shared = from_first(None)
        self.responses, disk.life, disk.found = shared
        return disk.found

    @contextmanager
    def journal(self) -> Iterator[Journal | None]:
        """Where this process notes responses until they are added; None where another one of its replica does."""
        self._journals += 1
        if parallel_state.get_model_parallel_group().rank() != 0:
            yield None
            return
        replica = parallel_state.get_data_parallel_rank()
        journal = Journal(self._directory.journal_path(self._journals, replica), self._directory.origin)
        try:
            yield journal
        finally:
            journal.close()

    def add(self, rollouts: Sequence[Rollout]) -> OSError | None:
        """Keep these rollouts, and write them to the next file; their journals go. Returns as `write` does."""
        self._keep(rollouts)
        for rollout in rollouts:
            self.responses.pop(rollout.key, None)
        return self._directory.add(list(rollouts)) if dist.get_rank() == 0 else None

    def write(self) -> OSError | None:
        """Write what could not be written before. Returns why it still cannot be, on process 0 if so."""
        return self._directory.write() if dist.get_rank() == 0 else None

    def files(self) -> list[Path]:
        """Those that are written, on process 0."""
        return self._directory.files

    def _keep(self, rollouts: Iterable[Rollout]) -> None:
        for rollout in rollouts:
            self._row_of[rollout.key] = len(self._cut_off)
            self._ids.extend(rollout.rejected_ids)
            self._starts.append(len(self._ids))
            self._ref_logps.extend((rollout.ref_chosen_logps, rollout.ref_rejected_logps))
            self._cut_off.append(rollout.finish_reason == "length")
            # a stop token alone says nothing
            self._empty += len(rollout.rejected_ids) == 1 and rollout.finish_reason == "stop"
            self._repeated += is_repeated(rollout.rejected_ids)
            self._matching += tuple(rollout.rejected_ids) == self._dataset[rollout.index].response_ids
            if math.isfinite(rollout.ref_chosen_logps) and math.isfinite(rollout.ref_rejected_logps):
                self._finite_logps += rollout.ref_rejected_logps
                self._finite_tokens += len(rollout.rejected_ids)
            else:
                self._not_finite += 1

    # ------------------------------------------------------------------------------------------ for people

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

    def samples(self, count: int) -> list[Sample]:
        """The first `count` by index, as text, of each example the first response; of the same examples in every
        iteration that uses all of them."""
        first = sorted(index for index, sample in self._row_of if sample == 0)[:count]
        pairs = [self._pair(self._dataset[index], 0) for index in first]
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

    def _row(self, rollout: Rollout) -> dict[str, Any]:
        example = self._dataset[rollout.index]
        return {
            "index": rollout.index,
            "sample": rollout.sample,
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


def is_repeated(ids: Sequence[int]) -> bool:
    """Whether a response goes round in circles: less than half of its runs of four tokens are different ones."""
    if len(ids) < _REPEATED_FROM_TOKENS:
        return False
    runs = [tuple(ids[i : i + _RUN]) for i in range(len(ids) - _RUN + 1)]
    return 2 * len(set(runs)) < len(runs)
