"""What the paper claims, and whether it held here. The rules were fixed before the first run on the
study's seeds, and after those for tuning.

A comparison holds where the 95% confidence interval of the mean difference (Student's t over seeds, paired: both runs
of a pair start from the same SFT model) lies on the claimed side of zero, fails where it lies on the other, and is
undecided where it has zero inside. A claim of several comparisons holds if all hold, fails if one fails, and is
undecided else. There are some dozens of comparisons: one or two fall outside by chance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from evidence import LAST, SFT_MODEL, Estimate, Study
from tasks import Figure

HOLDS, FAILS, UNDECIDED, MISSING = "holds", "fails", "undecided", "not measured"


@dataclass(frozen=True, slots=True)
class Comparison:
    """words: what is compared. this, other: the two sides. difference: this minus other. wanted: its sign, 1 or -1."""

    words: str
    this: Estimate
    other: Estimate | None
    difference: Estimate
    wanted: int
    form: str = "{:.3f}"

    @property
    def verdict(self) -> str:
        if self.difference.number == 0:
            return MISSING
        sides = {1: self.difference.is_above_zero, -1: self.difference.is_below_zero}
        return HOLDS if sides[self.wanted] else FAILS if sides[-self.wanted] else UNDECIDED


@dataclass(frozen=True, slots=True)
class Claim:
    """paper: what the paper says, and where. here: what was looked at. why: the reason that was found for what came
    out, by verdict; plots: keys of figures that show it."""

    key: str
    section: str
    title: str
    paper: str
    here: str
    comparisons: tuple[Comparison, ...]
    plots: tuple[str, ...] = ()
    why: dict[str, str] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        verdicts = [comparison.verdict for comparison in self.comparisons]
        for verdict in (MISSING, FAILS, UNDECIDED):
            if verdict in verdicts:
                return verdict
        return HOLDS if verdicts else MISSING

    @property
    def reason(self) -> str:
        return self.why.get(self.verdict, "")


class Comparing:
    """Comparisons of policies (variant, iteration) of a study by one figure."""

    def __init__(self, study: Study, figure: Figure, of: Callable[[float], float] | None = None) -> None:
        """of: applied to each side before the difference, as the distance from 0.5."""
        self.study, self.figure, self.of = study, figure, of or (lambda value: value)

    def __call__(self, words: str, this: tuple[str, int], other: tuple[str, int], wanted: int = 1) -> Comparison:
        difference = self.study.difference(this, other, self.figure.key, self.of)
        sides = [self.study.estimate(*side, self.figure.key) for side in (this, other)]
        return Comparison(words, *sides, difference, wanted, self.figure.form)

    def changes(self, words: str, first: tuple, second: tuple, wanted: int = 1) -> Comparison:
        """Whether the change from first[0] to first[1] is above that from second[0] to second[1]."""
        values = [self.study.values(*side, self.figure.key) for side in (*first, *second)]
        seeds = set.intersection(*map(set, values))
        before, after, earlier, later = values
        one = [self.of(after[s]) - self.of(before[s]) for s in sorted(seeds)]
        two = [self.of(later[s]) - self.of(earlier[s]) for s in sorted(seeds)]
        difference = Estimate.of([a - b for a, b in zip(one, two, strict=True)])
        return Comparison(words, Estimate.of(one), Estimate.of(two), difference, wanted, self.figure.form)


def from_half(value: float) -> float:
    """How far a classifier is from guessing."""
    return abs(value - 0.5)


def log(value: float) -> float:
    return math.log(max(value, 1e-12))


def claims(study: Study) -> list[Claim]:
    """All claims, in the order of the report."""
    import claims_language
    import claims_numbers
    import claims_text

    found = claims_language.claims(study) + claims_numbers.claims(study)
    return found + (claims_text.claims(study) if study.has_gsm8k else [])


__all__ = ["LAST", "SFT_MODEL", "Claim", "Comparing", "Comparison", "claims", "from_half", "log"]
