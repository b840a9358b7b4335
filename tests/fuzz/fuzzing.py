"""How the fuzzers run: few inputs, always the same, with the other tests; new ones for minutes with `make fuzz`.

A check says what became of an input, in a word such as "read" or "refused"; that it raises anything is a crash.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import SystemRandom
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.configuration import set_hypothesis_home_dir
from hypothesis.strategies import SearchStrategy

_ROUND = 200  # inputs that Hypothesis makes of one seed
# Hypothesis writes more than its database there, and into the working directory otherwise.
set_hypothesis_home_dir(os.path.join(tempfile.gettempdir(), "nemo_spin_hypothesis"))


def minutes() -> float:
    """How long `make fuzz` runs; 0 for the few inputs that are tried with the other tests."""
    return float(os.environ.get("NEMO_SPIN_FUZZ_MINUTES", 0))


@dataclass
class Tally:
    """tried: inputs. outcomes: what became of them. crashes: exceptions that are no answer, while none was shrunk."""

    tried: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    crashes: int = 0


_TALLIES: dict[str, Tally] = {}


class Fuzz:
    def __init__(self, name: str, seconds: float) -> None:
        """seconds: how long new inputs are tried; 0 for a fixed number of the same."""
        self.tally = _TALLIES.setdefault(name, Tally())
        self._seconds = seconds

    def __call__(self, inputs: SearchStrategy[Any], check: Callable[[Any], str], number: int) -> Tally:
        """Try `number` inputs, or as many as there is time for. Raises what `check` raises of the smallest input."""

        def try_one(value: Any) -> None:
            self.tally.tried += 1
            self.tally.outcomes[check(value)] += 1

        try:
            if not self._seconds:
                _with_settings(inputs, try_one, number, derandomize=True)()
            else:
                end = time.monotonic() + self._seconds
                while time.monotonic() < end:
                    a_round = _with_settings(inputs, try_one, _ROUND, derandomize=False)
                    seed(SystemRandom().getrandbits(64))(a_round)()
        except BaseException as error:
            self.tally.crashes += not isinstance(error, KeyboardInterrupt)
            raise
        return self.tally


def check_sentence(error: Exception, *names: str) -> None:
    """A refusal is one sentence that a terminal shows as it is, and has these names in it."""
    sentence = str(error)
    assert not re.search(r"[\x00-\x1f\x7f]", sentence) and len(sentence) < 3000, sentence
    assert all(name in sentence for name in names), sentence
    sentence.encode()


def _with_settings(
    inputs: SearchStrategy[Any], check: Callable[[Any], None], number: int, derandomize: bool
) -> Callable[[], None]:
    # Everything is said, because Hypothesis has other defaults where it sees a CI.
    return settings(
        max_examples=number,
        derandomize=derandomize,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.target, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        print_blob=False,
        report_multiple_bugs=False,
    )(given(inputs)(check))


def table() -> Iterator[str]:
    yield f"{'fuzzer':<32}{'inputs':>10}{'crashes':>10}   what became of them"
    for name, tally in _TALLIES.items():
        outcomes = ", ".join(f"{word} {count:,}" for word, count in sorted(tally.outcomes.items()))
        yield f"{name:<32}{tally.tried:>10,}{tally.crashes:>10}   {outcomes}"
    tried, crashes = (sum(getattr(tally, name) for tally in _TALLIES.values()) for name in ("tried", "crashes"))
    yield f"{'all':<32}{tried:>10,}{crashes:>10}"
