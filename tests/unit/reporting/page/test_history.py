"""Which lines of metrics.jsonl count: after a resume, after an interruption, while the run is writing."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from nemo_spin.errors import DataError
from nemo_spin.reporting.page.history import History, read_history


def line(kind: str, step: int, iteration: int = 0, **values: object) -> str:
    return json.dumps({"time": 1.0, "step": step, "iteration": iteration, "kind": kind, **values}) + "\n"


def read(tmp_path: Path, text: str | bytes) -> History:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_history(path)


def test_lines_after_the_step_that_was_resumed_from_do_not_count(tmp_path: Path) -> None:
    text = line("start", 0)
    text += "".join(line("train", step, loss=float(step)) for step in range(1, 5))
    text += line("iteration", 4, loss=4.0)
    text += line("rollout", 4, 1, **{"rollout/length": 9.0})
    text += line("train", 5, 1, loss=5.0) + line("train", 6, 1, loss=6.0) + line("rollout", 6, 2)
    text += line("resume", 4, 1)
    text += line("train", 5, 1, loss=50.0)
    history = read(tmp_path, text)
    assert history.series("loss").steps == [1, 2, 3, 4, 5]
    assert history.series("loss").values == [1.0, 2.0, 3.0, 4.0, 50.0]
    assert history.last("rollout/length", 1) == 9.0
    assert history.iterations() == [0, 1]
    assert (history.undone, history.resumes) == (3, 1)


def test_a_later_resume_may_go_further_back(tmp_path: Path) -> None:
    text = "".join(line("train", step, loss=1.0) for step in (1, 2, 3)) + line("resume", 2)
    text += line("train", 3, loss=2.0) + line("resume", 1) + line("train", 2, loss=3.0)
    assert read(tmp_path, text).series("loss").values == [1.0, 3.0]


@pytest.mark.parametrize("rest", [b'{"time": 1.0, "st', b"\xff\xfe", b"\x00\x00\x00"])
def test_a_last_line_that_is_cut_off_is_left_out(tmp_path: Path, rest: bytes) -> None:
    history = read(tmp_path, line("train", 1, loss=0.5).encode() + rest)
    assert history.series("loss").values == [0.5]


def test_a_line_that_an_interruption_cut_off_is_left_out(tmp_path: Path) -> None:
    history = read(tmp_path, line("train", 1, loss=0.5) + '{"time": 1.0, "st\n' + line("resume", 1))
    assert len(history.records) == 2


@pytest.mark.parametrize("last", ["", "}\n"])
def test_a_line_that_cannot_be_read_is_named(tmp_path: Path, last: str) -> None:
    with pytest.raises(DataError, match=r"metrics\.jsonl:2 is not a JSON object"):
        read(tmp_path, line("train", 1) + "{oh\n" + line("train", 2) + last)


def test_a_malformed_last_line_that_is_whole_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"metrics\.jsonl:2 "):
        read(tmp_path, line("train", 1) + "{oh\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]\n", "is not a JSON object"),
        ('{"time": 1, "kind": "train", "iteration": 0}\n', 'needs "step"'),
        ('{"time": 1, "kind": "train", "iteration": 0, "step": -1}\n', 'needs "step"'),
        ('{"time": 1, "kind": "train", "iteration": 0, "step": true}\n', 'needs "step"'),
        ('{"time": 1, "kind": "train", "iteration": 0.5, "step": 1}\n', 'needs "iteration"'),
        ('{"time": "now", "kind": "train", "iteration": 0, "step": 1}\n', 'needs "time"'),
        ('{"time": 1, "iteration": 0, "step": 1}\n', '"kind"'),
        ("", "has no lines yet"),
        ("\n \n", "has no lines yet"),
        ('{"time": 1', "has no lines yet"),
    ],
)
def test_what_is_wrong_with_a_line_is_said(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, text)


def test_values_that_are_no_numbers_are_kept_apart(tmp_path: Path) -> None:
    text = line("train", 1, loss=math.nan, lr=None, host="a", flag=True, new_metric=3)
    record = read(tmp_path, text).records[0]
    assert math.isnan(record.metrics["loss"]) and math.isnan(record.metrics["lr"])
    assert record.metrics["new_metric"] == 3.0
    assert record.notes == {"host": "a", "flag": "true"}


def test_a_summary_line_adds_no_second_point(tmp_path: Path) -> None:
    text = line("iteration", 0, val_loss=2.0) + line("rollout", 0, **{"rollout/length": 5.0})
    text += line("train", 1, loss=0.5) + line("validation", 1, val_loss=1.5)
    text += line("iteration", 1, loss=0.5, val_loss=1.5, **{"rollout/length": 5.0})
    history = read(tmp_path, text)
    assert history.series("val_loss").values == [2.0, 1.5]
    assert history.series("rollout/length").steps == [0]
    assert history.series("loss").steps == [1]
