"""The pairs of the iteration under way: of the responses that its reference makes, and of those of earlier iterations.

A replayed response is not generated again, but its log-probabilities, and those of the human response beside it, are
computed anew: they have to be those of the present reference. What has been made is in files of its own,

    rollouts/iteration-002/part-*.parquet                 made in iteration 2
    rollouts/iteration-002/of-iteration-001/part-*.parquet  those of iteration 1, scored in iteration 2

and a checkpoint holds both, with the earlier responses themselves, from which the next iteration goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from nemo_spin.config import SpinConfig
from nemo_spin.data.dataset import SFTDataset
from nemo_spin.errors import CheckpointError
from nemo_spin.reporting.console import Reporter
from nemo_spin.reporting.events import Sample
from nemo_spin.selfplay.pairs import Pair, Selection
from nemo_spin.selfplay.policy import Policy
from nemo_spin.selfplay.replay import Replay
from nemo_spin.selfplay.rollouts.iteration import Given, IterationRollouts
from nemo_spin.selfplay.rollouts.roll_out import Answer
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
    """Makes and keeps the pairs of one iteration at a time. Every process calls every method, in the same order.

    generated: the rollouts of the iteration's own reference.
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
        self._cfg, self._policy, self._dataset, self._replay, self._directory = cfg, policy, dataset, replay, directory
        spin = cfg.spin
        selection = Selection(spin.rejected_selection, spin.loss.preference_average_log_probs)
        self.generated = IterationRollouts(
            cfg, policy, dataset, directory, reporter, interrupted, False, spin.num_generations, selection
        )
        self._replays = [
            IterationRollouts(cfg, policy, dataset, directory, reporter, num_generations=spin.pairs_per_example)
            for _ in range(spin.replay_iterations)
        ]
        # iteration -> what its reference has made
        self._earlier: dict[int, RolloutStore] = {}
        self._earlier_unwritten: OSError | None = None
        self._iteration: int | None = None
        self._checkpointed: Mapping[str, Sequence[Path]] = {}
        self._data = dataset.digest

    def resume(self, files: Mapping[str, Sequence[Path]], data: str) -> None:
        """files: those of the checkpoint that the run goes on from, by kind, as `files` says them. data: the digest of
        the training examples that it was written with."""
        self._checkpointed, self._data = files, data

    def begin(self, iteration: int, ref_id: str) -> None:
        """Turn to an iteration; `ref_id` names the weights of its reference.

        Raises CheckpointError if the checkpoint that the run goes on from lacks what is to be replayed, or has it for
        other examples.
        """
        checkpointed, self._checkpointed = self._checkpointed, {}
        if self._iteration == iteration - 1:
            self._earlier[iteration - 1] = self.generated.store
        generations = {iteration - age for age in self._replay.ages(iteration)}
        kept, self._earlier = self._earlier, {}
        for generation in sorted(generations, reverse=True):
            store = kept.get(generation)
            self._earlier[generation] = self._recalled(generation, checkpointed) if store is None else store
        self._iteration = iteration
        self.generated.resume(checkpointed.get("rollouts", ()))
        self.generated.begin(iteration, ref_id, self._given_by_data() if iteration == 0 else None)
        for (generation, store), replay in zip(self._earlier.items(), self._replays, strict=False):
            replay.resume(checkpointed.get(_replay_kind(generation), ()))
            source = f"replay of iteration {generation}"
            given = Given(source, store.answers, f"of-iteration-{generation:03d}", str(store.origin))
            replay.begin(iteration, ref_id, given)

    def _given_by_data(self) -> Given | None:
        if not self._cfg.spin.first_rollouts_from_data:
            return None

        def answers(index: int) -> list[Answer]:
            return [self._policy.given_answer(self._dataset.given_rejected(index))]

        return Given("given", answers)

    def _recalled(self, generation: int, checkpointed: Mapping[str, Sequence[Path]]) -> RolloutStore:
        """What an earlier iteration's reference has made, from the checkpoint."""
        if self._data != self._dataset.digest:
            raise CheckpointError(
                f"The responses of iteration {generation}, which model.spin.replay_iterations = "
                f"{self._cfg.spin.replay_iterations} trains on again, are to other training examples: resume with the "
                "same model.data.train_ds.file_path, or with model.spin.replay_iterations=0."
            )
        files = checkpointed.get(_earlier_kind(generation), ())
        store = RolloutStore.recalled(
            self._directory / f"iteration-{generation:03d}", files, self._dataset, self._policy.decode,
            self.generated.num_generations, self.generated.selection,
        )  # fmt: skip
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
        """Whether all of these are there already."""
        return not any(rollouts.missing(indices) for rollouts, indices in self._by_generation(pairs))

    def make(self, pairs: Iterable[PairId], stop: Callable[[], bool]) -> bool:
        """Generate and score what of these is missing. stop, and what is returned: see `IterationRollouts.make`."""
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
        return rollouts.pair(pair.index, pair.number)

    def __len__(self) -> int:
        """Number of rollouts of the iteration's own generation, and of responses that are to be scored."""
        return len(self.generated)

    @property
    def num_tokens(self) -> int:
        """Tokens of all responses that the iteration's own reference has made."""
        return self.generated.num_tokens

    def summary(self) -> dict[str, float]:
        """`RolloutStore.summary` of the iteration's own generation, and `rollout/replayed`: pairs of earlier ones."""
        replayed = sum(len(replay) for replay, _ in zip(self._replays, self._earlier, strict=False))
        return self.generated.summary() | ({"rollout/replayed": float(replayed)} if self._replays else {})

    def samples(self, count: int) -> list[Sample]:
        """See `RolloutStore.samples`."""
        return self.generated.samples(count)

    # ------------------------------------------------------------------------------------------ on disk

    def files(self) -> dict[str, list[Path]]:
        """Those with the rollouts, by kind, on the process that writes; `unwritten` says why some are missing."""
        kinds = {"rollouts": self.generated.files()}
        self._earlier_unwritten = None
        for (generation, store), replay in zip(self._earlier.items(), self._replays, strict=False):
            kinds[_replay_kind(generation)] = replay.files()
            self._earlier_unwritten = store.write() or self._earlier_unwritten
            kinds[_earlier_kind(generation)] = store.files()
        return kinds

    @property
    def unwritten(self) -> OSError | None:
        """Why rollouts could not be written, if they could not."""
        made = (rollouts.unwritten for rollouts in (self.generated, *self._replays))
        return next((error for error in (*made, self._earlier_unwritten) if error is not None), None)


def _replay_kind(generation: int) -> str:
    return f"replay-{generation:03d}"


def _earlier_kind(generation: int) -> str:
    return f"earlier-{generation:03d}"
