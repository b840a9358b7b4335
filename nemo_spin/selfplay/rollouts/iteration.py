"""The rollouts of the current iteration: made chunk by chunk, stored as they are made, and found again on resume.

Nothing that is finished is made again, and whatever is made again is the same. Responses are functions of their index.
So are their log-probabilities, but for the last bits, which depend on the sequences in the same forward passes:
therefore chunks are cut from the wanted indices alone, whatever exists already, and are scored as a whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_spin.config import SpinConfig
from nemo_spin.data.example import Example
from nemo_spin.generation.interface import Key, Response
from nemo_spin.generation.schedule import MOST_SLOTS
from nemo_spin.reporting.console import Reporter
from nemo_spin.runtime.collectives import of_first
from nemo_spin.runtime.kill_points import reached
from nemo_spin.selfplay.pairs import Rollout, Selection
from nemo_spin.selfplay.policy import Policy
from nemo_spin.selfplay.rollouts.part import Origin, origin_of
from nemo_spin.selfplay.rollouts.roll_out import RolloutRequest
from nemo_spin.selfplay.rollouts.store import Dataset, RolloutStore

# Prompts of a chunk for each sequence that is decoded at a time: many, because slots run empty at the end of a chunk.
_CHUNK = 64
_ALL = Selection()


@dataclass(frozen=True, slots=True)
class Given:
    """Responses that exist already, and are only scored.

    source, origin: where they come from; rollouts of responses from elsewhere are never taken for these.
    responses: to the example of an index, numbered from 0, as many as there are generations.
    directory: below that of the iteration, if the iteration has rollouts of its own beside these.
    """

    source: str
    responses: Callable[[int], list[Response]]
    directory: str = ""
    origin: str = ""


class IterationRollouts:
    """Makes and stores the rollouts of one iteration at a time. Every process calls every method, in the same order.

    store: the rollouts of the current iteration, from `begin` on.
    """

    store: RolloutStore

    def __init__(
        self,
        cfg: SpinConfig,
        policy: Policy,
        dataset: Dataset,
        directory: Path,
        reporter: Reporter,
        interrupted: Callable[[], bool] | None = None,
        held_out: bool = False,
        num_generations: int = 1,
        selection: Selection = _ALL,
    ) -> None:
        """directory: gets a directory for each iteration. interrupted: see `Engine.generate`.

        held_out: the data are those for validation, which may change when a run is resumed. num_generations,
        selection: see `RolloutStore`.
        """
        self._policy, self._dataset, self._directory, self._reporter = policy, dataset, directory, reporter
        self._interrupted, self._held_out = interrupted, held_out
        self._num_generations, self._selection = num_generations, selection
        slots = (cfg.spin.rollout_batch_size or MOST_SLOTS) * cfg.parallel.data_parallel_size
        self._chunk = max(1, _CHUNK * slots // num_generations)
        self._iteration: int | None = None
        self._checkpointed: Sequence[Path] = ()

    def resume(self, files: Sequence[Path]) -> None:
        """files: the checkpoint's rollouts of the iteration that begins next."""
        self._checkpointed = files

    def begin(self, iteration: int, ref_id: str, given: Given | None = None) -> None:
        """Turn to an iteration, and load what the checkpoint and the directory hold of it.

        ref_id: identifies the reference's weights; only what they have made is loaded. given: the responses, if they
        are not to be generated.
        """
        if self._iteration is not None and self.store.unwritten is not None:
            self.store.write()
        self._iteration, self._given = iteration, given
        settings = self._policy.rollout_settings(iteration) | {
            "iteration": iteration,
            "data": self._dataset.digest,
            "source": "generated" if given is None else given.source + given.origin,
        }
        directory = self._directory_of(iteration)
        self.store = self._store_in(
            directory if given is None else directory / given.directory, Origin(ref_id, _digest(settings))
        )
        found = str(self.store.find(self._checkpointed, trusted=not self._held_out))
        self._checkpointed = ()
        if found:
            self._reporter.say(f"{self.store.path}: {found}")

    def recall(self, iteration: int, files: Sequence[Path]) -> RolloutStore:
        """The rollouts of an earlier iteration in the files of a checkpoint, which say themselves of what origin."""
        origin = of_first(lambda: origin_of(files[0]) if files else Origin("", ""))
        store = self._store_in(self._directory_of(iteration), origin)
        store.find(files)
        return store

    def _directory_of(self, iteration: int) -> Path:
        return self._directory / f"iteration-{iteration:03d}"

    def _store_in(self, directory: Path, origin: Origin) -> RolloutStore:
        return RolloutStore(
            directory,
            origin,
            self._dataset,
            self._policy.decode,
            self._num_generations,
            self._selection,
            self._reporter.say,
        )

    # ------------------------------------------------------------------------------------------ making

    def make(self, indices: Iterable[int], stop: Callable[[], bool]) -> bool:
        """Make the rollouts that are missing for these examples, chunk by chunk.

        stop: asked after each chunk whether to leave the rest. A chunk whose generation was interrupted is otherwise
        taken up again.

        Returns whether it was stopped.
        """
        wanted = sorted(set(indices))
        count = len(self.store.missing(wanted)) * self._num_generations
        if not count:
            return False
        with self._reporter.rollouts(self._iteration, count, self._what) as progress:
            for start in range(0, len(wanted), self._chunk):
                while missing := self.store.missing(wanted[start : start + self._chunk]):
                    self._make_chunk([self._dataset[index] for index in missing], progress)
                    if stop():
                        return True
        return False

    def _make_chunk(self, examples: list[Example], progress: Callable[[str, int], None]) -> None:
        rollouts = self._roll_out(examples, progress)
        if rollouts is None:
            return
        reached("rollouts/scored")
        self.store.add(rollouts)
        if self._held_out:
            reached("held_out/part")
        else:
            reached("rollouts/part")

    def _roll_out(self, examples: list[Example], progress: Callable[[str, int], None]) -> list[Rollout] | None:
        """The rollouts of these examples; None if generation was interrupted."""
        known = self._known(examples)
        progress("generating", len(known))
        with self.store.journal() as journal:
            result = self._policy.roll_out(
                RolloutRequest(
                    examples,
                    self._iteration,
                    self._num_generations,
                    known=known,
                    progress=progress,
                    finished=None if journal is None else journal.append,
                    interrupted=self._interrupted,
                )
            )
        self.store.responses.update(result.responses)
        return result.rollouts

    def _known(self, examples: list[Example]) -> Mapping[Key, Response]:
        """The responses to these examples that need not be generated."""
        if self._given is not None:
            return {response.key: response for e in examples for response in self._given.responses(e.index)}
        indices = {example.index for example in examples}
        return {key: response for key, response in self.store.responses.items() if key[0] in indices}

    @property
    def _what(self) -> str:
        if self._given is not None and self._given.directory:
            return self._given.source
        return "held-out rollouts" if self._held_out else "rollouts"


def _digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:40]
