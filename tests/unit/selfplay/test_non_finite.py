"""What the report of a batch that ended a run advises, and where it finds its examples in the data."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

from nemo_spin.data.example import Example
from nemo_spin.data.load_report import LoadReport
from nemo_spin.selfplay.non_finite import Diagnosis, ResponseLogps, advice, places
from nemo_spin.selfplay.pairs import Pair

FINE, BAD = ResponseLogps(-3.0, ()), ResponseLogps(math.nan, (2,))


def pair(ref_chosen_logps: float = -1.0) -> Pair:
    return Pair(Example(0, (1,), (2,)), (3,), "stop", ref_chosen_logps, -2.0)


def test_the_first_cause_is_named() -> None:
    everything = Diagnosis([BAD], [FINE], ["decoder.final_layernorm.weight"], ["decoder.final_layernorm.weight"])
    assert "earlier checkpoint" in advice(everything, [pair(math.nan)])
    gradients = everything.gradients
    assert "reference gives no finite" in advice(Diagnosis([BAD], [FINE], [], gradients), [pair(math.nan)])
    assert "the pairs that are marked" in advice(Diagnosis([FINE], [BAD], [], gradients), [pair()])
    assert "the gradient is not" in advice(Diagnosis([FINE], [FINE], [], gradients), [pair()])
    assert "Nothing that was looked at again" in advice(Diagnosis([FINE], [FINE], [], []), [pair()])


def test_examples_are_found_in_their_files(tmp_path: Path) -> None:
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "gone.jsonl"]
    for path in paths[:2]:
        path.write_text('{"n": 0}\n\n{"n": 1}\n{"n": 2}\n')
    reports = [LoadReport(str(path), 8, read=3) for path in paths]
    reports[1].dropped.add("line 1")
    dataset = SimpleNamespace(reports=reports, place=lambda index: divmod(index, 10))
    found = places(dataset, [Example(index, (), ()) for index in (2, 1, 11, 20)])
    assert found == {
        2: f"{paths[0]}:4",
        1: f"{paths[0]}:3",
        11: f"{paths[1]}, example 2 of those that were kept",
        20: f"{paths[2]}, example 1 of those that were kept",
    }
