"""metrics.jsonl, and what goes to loggers."""

from __future__ import annotations

import errno
import json
import math
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

from nemo_spin.reporting import metrics_log
from nemo_spin.reporting.console import Reporter
from nemo_spin.reporting.events import GuardWarning, Sample
from nemo_spin.reporting.metrics_log import MetricsLog
from nemo_spin.runtime.progress import Progress

SAMPLES = [Sample(7, "2 + 2?", "4", "five\nor six", "length")]


class Recording:
    """Stands for a logger of Lightning, and for what its `experiment` is."""

    run_id = "run"

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple, dict[str, Any]]] = []
        self.experiment = self

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))


def logger_of(class_name: str) -> Recording:
    return type(class_name, (Recording,), {})()


def test_lines_are_on_disk_with_their_position(tmp_path: Path) -> None:
    logger = logger_of("TensorBoardLogger")
    log = MetricsLog(tmp_path / "metrics.jsonl", [logger])
    log.write("start", Progress(), {})
    log.write("train", Progress(1, 2, 8, 64), {"loss": 0.5, "grad_norm": math.nan}, epoch=1)
    start, train = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (start["kind"], start["step"], start["iteration"]) == ("start", 0, 0)
    assert (train["step"], train["iteration"], train["epoch"], train["loss"]) == (8, 1, 1, 0.5)
    assert math.isnan(train["grad_norm"]) and train["time"] >= start["time"]
    ((name, (metrics, step), _),) = logger.calls
    assert (name, step, metrics["loss"], metrics["iteration"]) == ("log_metrics", 8, 0.5, 1)


def test_a_warning_is_a_line_without_metrics(tmp_path: Path) -> None:
    logger = logger_of("TensorBoardLogger")
    log = MetricsLog(tmp_path / "metrics.jsonl", [logger])
    Reporter(is_main=False, log=log).warn(GuardWarning("empty", "Too many."), Progress(step=3))
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line.pop("time") > 0
    assert line == {"kind": "warning", "step": 3, "iteration": 0, "guard": "empty", "text": "Too many."}
    assert logger.calls == []


def test_half_a_line_does_not_spoil_the_next(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "st')
    MetricsLog(path).write("resume", Progress(), {})
    half, whole = path.read_text().splitlines()
    assert half == '{"kind": "train", "st' and json.loads(whole)["kind"] == "resume"


def test_a_full_disk_does_not_end_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    log = MetricsLog(tmp_path / "metrics.jsonl", [], warnings.append)
    log.write("start", Progress(), {})
    write = metrics_log._write

    def half_of_it(file: FileIO, data: bytes) -> None:
        write(file, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(metrics_log, "_write", half_of_it)
    for step in (1, 2):
        log.write("train", Progress(step=step), {"loss": 0.5})
    monkeypatch.undo()
    log.write("train", Progress(step=3), {"loss": 0.5})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3], "each of them whole, and once"
    assert len(warnings) == 1 and "No space left on device" in warnings[0]


def test_a_logger_that_fails_does_not_end_a_run() -> None:
    class Failing(Recording):
        def log_metrics(self, *args: Any) -> None:
            raise RuntimeError("no route\nto host")

    warnings: list[str] = []
    other = logger_of("TensorBoardLogger")
    log = MetricsLog(None, [Failing(), other], warnings.append)
    for step in (1, 2):
        log.write("train", Progress(step=step), {"loss": 0.5})
    assert [name for name, _, _ in other.calls] == ["log_metrics"] * 2
    assert len(warnings) == 1 and "Failing failed (no route to host)" in warnings[0]


@pytest.mark.parametrize("name", ["TensorBoardLogger", "WandbLogger", "MLFlowLogger", "AnotherLogger"])
def test_samples_are_shown_where_text_can_be(name: str) -> None:
    logger = logger_of(name)
    MetricsLog(None, [logger]).write_samples(SAMPLES, Progress(iteration=2, step=30))
    shown = str(logger.calls)
    if name == "AnotherLogger":
        assert not logger.calls
    else:
        assert len(logger.calls) == 1 and all(word in shown for word in ("2 + 2?", "five", "or six", "length"))
        assert "30" in shown or "002" in shown


def test_real_tensorboard_takes_metrics_and_samples(tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    lightning = pytest.importorskip("lightning.pytorch.loggers")
    logger = lightning.TensorBoardLogger(tmp_path, name="", version="")
    log = MetricsLog(None, [logger])
    log.write("train", Progress(step=3), {"rewards/margins": 0.25})
    log.write_samples(SAMPLES, Progress(step=3))
    logger.finalize("success")
    events = tensorboard.EventAccumulator(str(tmp_path))
    events.Reload()
    (point,) = events.Scalars("rewards/margins")
    assert (point.step, point.value) == (3, 0.25)
    (text,) = events.Tensors("samples/7/text_summary")
    assert b"    or six" in text.tensor_proto.string_val[0]
