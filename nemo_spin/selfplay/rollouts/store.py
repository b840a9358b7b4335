"""The rollouts of an iteration: made once, used in every epoch, and written to Parquet files that people can open."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch.distributed as dist
from megatron.core import parallel_state

from nemo_spin.data.example import Example
from nemo_spin.generation.interface import Key, Response
from nemo_spin.reporting.events import Sample
from nemo_spin.runtime.collectives import from_first
from nemo_spin.selfplay.pairs import Pair, Rollout, Selection
from nemo_spin.selfplay.rollouts.directory import Found, RolloutDirectory
from nemo_spin.selfplay.rollouts.figures import RolloutFigures
from nemo_spin.selfplay.rollouts.journal import Journal
from nemo_spin.selfplay.rollouts.part import Origin, row_of


class Dataset(Protocol):
    """Examples by index. digest: of all of them."""

    digest: str

    def __getitem__(self, index: int) -> Example: ...


class RolloutStore:
    """The rollouts of one iteration: in memory on every process, on disk for people and for a resumed run.

    Every process calls every method. Rank 0 writes the rollouts; the first process of each data-parallel replica writes
    a journal of responses.

    path: the directory. origin: of all rollouts in it.
    responses: those that are not scored yet, by key; adding their rollouts removes them.
    figures: of all rollouts.
    unwritten: on rank 0 the error of the last write if it failed, else None.
    """

    def __init__(
        self,
        path: Path,
        origin: Origin,
        dataset: Dataset,
        decode: Callable[[Sequence[int]], str],
        num_generations: int,
        selection: Selection,
        say: Callable[[str], None],
    ) -> None:
        """path: the same on every process and visible to all of them. decode: token ids -> text, for people to read.

        num_generations: responses to each prompt. selection: which of them make pairs. say: tells the user that the
        disk is full, and that it no longer is.
        """
        self.path, self.origin = path, origin
        self.responses: dict[Key, Response] = {}
        self.figures = RolloutFigures()
        self.unwritten: OSError | None = None
        self._dataset, self._decode, self._say = dataset, decode, say
        self._samples, self._selection = range(num_generations), selection
        # Every process holds all of them, which is affordable because ids take 4 bytes a token.
        self._rollouts: dict[Key, Rollout] = {}
        self._directory = RolloutDirectory(path, origin, lambda r: row_of(r, dataset[r.response.index], decode))
        self._journals = 0

    # ------------------------------------------------------------------------------------------ what there is

    @property
    def is_empty(self) -> bool:
        """Whether there is neither a rollout nor a response."""
        return not self._rollouts and not self.responses

    def missing(self, indices: Iterable[int]) -> list[int]:
        """The examples' indices that lack a rollout, each once, in ascending order."""
        return sorted({i for i in indices if any((i, sample) not in self._rollouts for sample in self._samples)})

    def selected(self, index: int) -> list[Rollout]:
        """The rollouts of an example that make pairs. Raises KeyError if it lacks one."""
        return self._selection([self._rollouts[index, sample] for sample in self._samples])

    def pair(self, index: int, number: int = 0) -> Pair:
        """An example with one of its `selected` rollouts, by number. Raises KeyError if it lacks one."""
        return Pair.of(self._dataset[index], self.selected(index)[number])

    def samples(self, count: int) -> list[Sample]:
        """The first response to each of the first `count` examples by index, as text.

        They are of the same examples in every iteration that uses all of them.
        """
        first = sorted(index for index, sample in self._rollouts if sample == 0)[:count]
        return [self._sample(self._dataset[index], self._rollouts[index, 0].response) for index in first]

    def _sample(self, example: Example, response: Response) -> Sample:
        texts = map(self._decode, (example.prompt_ids, example.response_ids, response.ids))
        return Sample(example.index, *texts, response.finish_reason)

    # ------------------------------------------------------------------------------------------ on disk

    def find(self, checkpointed: Sequence[Path] = (), trusted: bool = True) -> Found:
        """Load what the directory and a checkpoint hold of this origin, the same on every process.

        checkpointed, trusted: see `RolloutDirectory.read_parts`. Rank 0 alone reads: what another machine wrote last
        may become visible late, and not everywhere at once.
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
        """A journal for the responses of this data-parallel replica; None if another process of it has the journal."""
        self._journals += 1
        if parallel_state.get_model_parallel_group().rank() != 0:
            yield None
            return
        replica = parallel_state.get_data_parallel_rank()
        journal = Journal(self._directory.journal_path(self._journals, replica), self.origin)
        try:
            yield journal
        finally:
            journal.close()
            if journal.error is not None and self.unwritten is None:
                self._warn(journal.error)

    def add(self, rollouts: Sequence[Rollout]) -> None:
        """Keep rollouts, and write them to the next file; then their journals are removed. See `unwritten`."""
        self._keep(rollouts)
        for rollout in rollouts:
            self.responses.pop(rollout.response.key, None)
        if dist.get_rank() == 0:
            self._note(self._directory.add(list(rollouts)))

    def write(self) -> list[Path]:
        """Write what could not be written before. Returns all files that are written, on rank 0. See `unwritten`."""
        if dist.get_rank() == 0:
            self._note(self._directory.write())
        return self._directory.files

    def _note(self, error: OSError | None) -> None:
        if error is not None and self.unwritten is None:
            self._warn(error)
        elif error is None and self.unwritten is not None:
            self._say(f"Rollouts are written to {self.path} again.")
        self.unwritten = error

    def _warn(self, error: OSError) -> None:
        self._say(
            f"warning: rollouts cannot be written to {self.path} ({error.strerror or error}): the run goes on with "
            "them in memory and tries again with the next ones; make room."
        )

    def _keep(self, rollouts: Iterable[Rollout]) -> None:
        for rollout in rollouts:
            self._rollouts[rollout.response.key] = rollout
            self.figures.add(rollout, self._dataset[rollout.response.index].response_ids)
