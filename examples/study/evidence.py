"""The figures of all runs, by the names of the table of runs, and the statistics of them over seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from results import Result, Results, Row

if TYPE_CHECKING:
    from experiments import Scale, Variant
    from tasks import Task

SFT_MODEL, LAST = -1, 1000
"""In place of an iteration's number: the model that a run starts from, and its last policy."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over seeds. error: its standard error; interval: half of its 95% confidence interval, by Student's t."""

    mean: float
    error: float
    interval: float
    number: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        number = len(values)
        if not number:
            return cls(math.nan, math.nan, math.nan, 0)
        mean = sum(values) / number
        if number == 1:
            return cls(mean, math.nan, math.nan, 1)
        error = math.sqrt(sum((value - mean) ** 2 for value in values) / (number - 1) / number)
        return cls(mean, error, error * _quantile(number - 1), number)

    @property
    def is_above_zero(self) -> bool:
        return self.number > 1 and self.mean - self.interval > 0

    @property
    def is_below_zero(self) -> bool:
        return self.number > 1 and self.mean + self.interval < 0


def _quantile(degrees: int) -> float:
    from scipy.stats import t

    return float(t.ppf(0.975, degrees))


@dataclass(frozen=True)
class Study:
    """variants: by name. results: of each variant, by seed; those that failed have an error. wall: seconds
    that the study took. known: the tasks. gsm8k: whether real text was there.
    """

    variants: dict[str, Variant]
    results: dict[str, dict[int, Result]]
    scale: Scale
    known: dict[str, Task]
    wall: float

    @classmethod
    def read(
        cls, variants: Sequence[Variant], output: Path, scale: Scale, known: dict[str, Task], wall: float
    ) -> Study:
        from experiments import key_of

        stored = Results(output / "results")
        nothing = Result((), {}, "it was not run")
        found = {
            variant.name: {job.seed: stored.get(key_of(job, scale, known)) or nothing for job in variant.jobs()}
            for variant in variants
        }
        return cls({variant.name: variant for variant in variants}, found, scale, known, wall)

    @property
    def has_gsm8k(self) -> bool:
        return "gsm8k" in self.known

    @property
    def failures(self) -> list[str]:
        """Runs without a whole result, in words."""
        return [
            f"{name}, seed {seed}: {result.error}"
            for name, results in self.results.items()
            for seed, result in results.items()
            if result.error is not None
        ]

    def row(self, variant: str, seed: int, iteration: int) -> Row | None:
        """The policy of a run after an iteration; for the SFT model the one that the run started from."""
        result = self.results.get(variant, {}).get(seed)
        if result is None or result.error is not None:
            return None
        if iteration == LAST:
            return result.rows[-1]
        if iteration == SFT_MODEL and result.at(-1) is None:
            job = self.variants[variant].job
            return self.row(f"{'' if job.task == 'numbers' else job.task + ': '}SFT model, {job.shape}", seed, -1)
        return result.at(iteration)

    def values(self, variant: str, iteration: int, figure: str) -> dict[int, float]:
        """By seed; of those runs that have it."""
        rows = {seed: self.row(variant, seed, iteration) for seed in self.results.get(variant, {})}
        found = {seed: row.figures.get(figure, math.nan) for seed, row in rows.items() if row is not None}
        return {seed: value for seed, value in found.items() if math.isfinite(value)}

    def estimate(self, variant: str, iteration: int, figure: str) -> Estimate:
        return Estimate.of(list(self.values(variant, iteration, figure).values()))

    def difference(
        self,
        this: tuple[str, int],
        other: tuple[str, int],
        figure: str,
        of: Callable[[float], float] = lambda value: value,
    ) -> Estimate:
        """Of two policies (variant, iteration), paired by seed: this minus other, after `of`."""
        first, second = self.values(*this, figure), self.values(*other, figure)
        return Estimate.of([of(first[seed]) - of(second[seed]) for seed in first if seed in second])

    def iterations(self, variant: str) -> list[int]:
        """The iterations that all of its runs have, the SFT model first."""
        whole = [result for result in self.results.get(variant, {}).values() if result.error is None]
        common = set.intersection(*({row.iteration for row in result.rows} for result in whole)) if whole else set()
        return sorted(common | {SFT_MODEL}) if whole else []

    def steps(self, variant: str) -> int | None:
        """Optimizer steps of a whole run."""
        whole = [result for result in self.results.get(variant, {}).values() if result.error is None]
        return whole[0].rows[-1].step if whole else None

    def spent(self) -> dict[str, float]:
        """Seconds of all runs that are reported, by what they were spent on."""
        total: dict[str, float] = {}
        for results in self.results.values():
            for result in results.values():
                for name, value in result.seconds.items():
                    total[name] = total.get(name, 0.0) + value
        return total
