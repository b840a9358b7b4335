"""The pairs of the current iteration: of responses that its reference generates, and of those of earlier iterations.

A replayed response is not generated again, but its log-probabilities, and those of the human response beside it, are
computed anew: they must be those of the current reference. Each generation has files of its own,

    rollouts/iteration-002/part-*.parquet                   generated in iteration 2
    rollouts/iteration-002/of-iteration-001/part-*.parquet  generated in iteration 1, scored in iteration 2

and a checkpoint holds both, with the earlier responses themselves, which the next iteration starts from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from nemo_spin.config import SpinConfig
from nemo_spin.data.dataset import SFTDataset
from nemo_spin.errors import CheckpointError
from nemo_spin.generation.interface import Response
from nemo_spin.reporting.console import Reporter
from nemo_spin.selfplay.pairs import Pair, Selection
from nemo_spin.selfplay.policy import Policy
from nemo_spin.selfplay.replay import Replay
from nemo_spin.selfplay.rollouts.iteration import Given, IterationRollouts
from nemo_spin.selfplay.rollouts.store import RolloutStore


class PairId(NamedTuple):
    """A row of `Replay.epoch`. age: 0 for the iteration's own generation. number: among the pairs of the example."""

    age: int
    index: int
    number: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Which pairs a global batch has, and the epoch of its iteration that it belongs to."""

    epoch: int
    pairs: list[PairId]


@dataclass(frozen=True, slots=True)
class PairBatch:
    """A global batch with the reference's responses."""

    epoch: int
    pairs: list[Pair]


class IterationPairs:
    """Makes and stores the pairs of one iteration at a time. Every process calls every method, in the same order.

    generated: the rollouts that the current reference generates.
    """

    def __init__(
        self,
        cfg: SpinConfig,
        policy: Policy,
        dataset: SFTDataset,
        replay: Replay,
        directory: Path,
        reporter: Reporter,
        interrupted: Callable[[], bool] | None = None,
    ) -> None:
        """directory: gets a directory for each iteration. interrupted: see `Engine.generate`."""
        self._cfg, self._policy, self._dataset, self._replay = cfg, policy, dataset, replay
        spin = cfg.spin
        selection = Selection(spin.rejected_selection, spin.loss.preference_average_log_probs)
        self.generated = IterationRollouts(
            cfg, policy, dataset, directory, reporter, interrupted, False, spin.num_generations, selection
        )
        # By age, from 1 on: the responses of an earlier iteration, scored by the current reference.
        self._replays = [
            IterationRollouts(cfg, policy, dataset, directory, reporter, num_generations=spin.pairs_per_example)
            for _ in range(spin.replay_iterations)
        ]
        # iteration -> what its own reference has generated, by age
        self._earlier: dict[int, RolloutStore] = {}
        self._iteration: int | None = None
        self._checkpointed: Mapping[str, Sequence[Path]] = {}
        self._data = dataset.digest

    def resume(self, files: Mapping[str, Sequence[Path]], data: str) -> None:
        """files: those of the checkpoint that is resumed, by kind, as `write` returns them. data: the digest of the
        training examples that it was written with."""
        self._checkpointed, self._data = files, data

    def begin(self, iteration: int, ref_id: str) -> None:
        """Turn to an iteration; `ref_id` identifies the weights of its reference.

        Raises CheckpointError if the checkpoint that is resumed lacks what is to be replayed, or has it for other
        examples.
        """
        checkpointed, self._checkpointed = self._checkpointed, {}
        kept = self._earlier
        if self._iteration == iteration - 1:
            kept[iteration - 1] = self.generated.store
        self._earlier = {
            generation: kept[generation] if generation in kept else self._recalled(generation, checkpointed)
            for generation in (iteration - age for age in self._replay.ages(iteration))
        }
        self._iteration = iteration
        self.generated.resume(checkpointed.get("rollouts", ()))
        self.generated.begin(iteration, ref_id, self._given_by_data() if iteration == 0 else None)
        for generation, earlier, replay in self._replayed():
            replay.resume(checkpointed.get(_replay_kind(generation), ()))
            replay.begin(iteration, ref_id, _given_by_earlier(generation, earlier))

    def _replayed(self) -> Iterator[tuple[int, RolloutStore, IterationRollouts]]:
        """Of each earlier iteration: its number, what its own reference has generated, and that scored anew."""
        for (generation, earlier), replay in zip(self._earlier.items(), self._replays, strict=False):
            yield generation, earlier, replay

    def _given_by_data(self) -> Given | None:
        if not self._cfg.spin.first_rollouts_from_data:
            return None
        return Given("given", lambda index: [self._policy.given_response(index, self._dataset.given_rejected(index))])

    def _recalled(self, generation: int, checkpointed: Mapping[str, Sequence[Path]]) -> RolloutStore:
        """What an earlier iteration's reference has generated, from the checkpoint."""
        if self._data != self._dataset.digest:
            raise CheckpointError(
                f"The responses of iteration {generation}, which model.spin.replay_iterations = "
                f"{self._cfg.spin.replay_iterations} trains on again, are to other training examples: resume with the "
                "same model.data.train_ds.file_path, or with model.spin.replay_iterations=0."
            )
        store = self.generated.recall(generation, checkpointed.get(_earlier_kind(generation), ()))
        wanted = [self._replay.examples(generation, e) for e in range(self._replay.max_epochs[generation])]
        if missing := store.missing({index for indices in wanted for index in indices.tolist()}):
            raise CheckpointError(
                f"The checkpoint lacks {len(missing)} responses of iteration {generation}, which "
                f"model.spin.replay_iterations = {self._cfg.spin.replay_iterations} trains on again: resume with "
                "the value with which it was written, or with 0."
            )
        return store

    # ------------------------------------------------------------------------------------------ making

    def is_made(self, pairs: Iterable[PairId]) -> bool:
        """Whether all of these pairs exist already."""
        return not any(rollouts.store.missing(indices) for rollouts, indices in self._by_generation(pairs))

    def make(self, pairs: Iterable[PairId], stop: Callable[[], bool]) -> bool:
        """Generate and score what these pairs lack. stop, and what is returned: see `IterationRollouts.make`."""
        return any(rollouts.make(indices, stop) for rollouts, indices in self._by_generation(pairs))

    def _by_generation(self, pairs: Iterable[PairId]) -> list[tuple[IterationRollouts, set[int]]]:
        indices: list[set[int]] = [set() for _ in range(1 + len(self._earlier))]
        for pair in pairs:
            indices[pair.age].add(pair.index)
        return list(zip((self.generated, *self._replays), indices, strict=False))

    # ------------------------------------------------------------------------------------------ what there is

    def pair(self, pair: PairId) -> Pair:
        """Raises KeyError if it has not been made."""
        rollouts = self._replays[pair.age - 1] if pair.age else self.generated
        return rollouts.store.pair(pair.index, pair.number)

    def summary(self) -> dict[str, float]:
        """`RolloutFigures.summary` of the current generation, and `rollout/replayed`, the number of earlier responses
        scored anew, if the run replays any."""
        replayed = sum(replay.store.figures.responses for _, _, replay in self._replayed())
        figures = self.generated.store.figures.summary()
        return figures | ({"rollout/replayed": float(replayed)} if self._replays else {})

    # ------------------------------------------------------------------------------------------ on disk

    def write(self) -> dict[str, list[Path]]:
        """Write what is not written yet. Returns the files with the rollouts, by kind, on rank 0. See `unwritten`."""
        kinds = {"rollouts": self.generated.store.write()}
        for generation, earlier, replay in self._replayed():
            kinds[_replay_kind(generation)] = replay.store.write()
            kinds[_earlier_kind(generation)] = earlier.write()
        return kinds

    @property
    def unwritten(self) -> OSError | None:
        """Why some rollouts are not written, if any are not. See `RolloutStore.unwritten`."""
        replayed = (store for _, earlier, replay in self._replayed() for store in (replay.store, earlier))
        return next((s.unwritten for s in (self.generated.store, *replayed) if s.unwritten is not None), None)


def _given_by_earlier(generation: int, store: RolloutStore) -> Given:
    """The responses of an earlier iteration that make pairs."""

    def responses(index: int) -> list[Response]:
        return [replace(rollout.response, sample=number) for number, rollout in enumerate(store.selected(index))]

    return Given(f"replay of iteration {generation}", responses, f"of-iteration-{generation:03d}", str(store.origin))


def _replay_kind(generation: int) -> str:
    return f"replay-{generation:03d}"


def _earlier_kind(generation: int) -> str:
    return f"earlier-{generation:03d}"
