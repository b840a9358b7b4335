"""Where a run's metrics go: metrics.jsonl in its directory, and the loggers that exp_manager attached.

metrics.jsonl has one object per line: `time` (Unix seconds), `kind`, `step` (optimizer steps of the whole run),
`iteration`, and metrics by their names; a `warning` has `guard` and `text` instead. A `start` or `resume` line has
`total_steps`, of the whole run, and the `end` of a run that ended at its equilibrium a `reason`. After a `resume` line
at step s, lines before it with a later step no longer count: that part of the run was done again.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from nemo_spin.reporting.events import Sample
from nemo_spin.runtime.progress import Progress

FILE_NAME = "metrics.jsonl"


class MetricsLogger(Protocol):
    """A Lightning logger, as far as it is used."""

    def log_metrics(self, metrics: dict[str, float], step: int) -> None: ...

    def finalize(self, status: str) -> None: ...


class MetricsLog:
    """Writes metrics as they come; a line is on disk when the call returns.

    No trouble with them ends a run. Lines for which there is no room wait in memory for the next one; a logger that
    fails goes without what it failed at. Either is told once.
    """

    def __init__(
        self,
        path: Path | None = None,
        loggers: Sequence[MetricsLogger] = (),
        warn: Callable[[str], None] | None = None,
    ) -> None:
        """path: the file to append to, None for none. warn: told what cannot be written; None for the terminal."""
        self._path = path
        self._loggers = list(loggers)
        self._warn = warn or partial(tqdm.write, file=sys.stderr)
        self._waiting = b""
        self._told: set[str] = set()

    def write(self, kind: str, progress: Progress, metrics: dict[str, float], **position: int) -> None:
        """kind: start, train, rollout, equilibrium, validation, checkpoint, iteration or resume.

        position: further counts.
        """
        counts = {"step": progress.step, "iteration": progress.iteration, **position}
        self._append({"kind": kind, **counts, **metrics})
        if metrics:
            for logger in self._loggers:
                with self._going_on_without(logger):
                    logger.log_metrics({**metrics, **counts}, progress.step)

    def write_text(self, kind: str, progress: Progress, texts: Mapping[str, str]) -> None:
        """A line of texts, which loggers do not get. kind: `warning`, with `guard`, its name, and `text`; or `end`."""
        self._append({"kind": kind, "step": progress.step, "iteration": progress.iteration, **texts})

    def finish(self, succeeded: bool) -> None:
        """Tell the loggers that the run is over."""
        for logger in self._loggers:
            with self._going_on_without(logger):
                logger.finalize("success" if succeeded else "failed")

    def write_samples(self, samples: Sequence[Sample], progress: Progress) -> None:
        """Generated responses beside the human ones, for those of the loggers that show text."""
        for logger in self._loggers:
            show = _SHOW.get(type(logger).__name__)
            if samples and show is not None:
                with self._going_on_without(logger):
                    show(logger, samples, progress)

    def _append(self, line: dict[str, Any]) -> None:
        if self._path is None:
            return
        self._waiting += json.dumps({"time": time.time(), **line}).encode() + b"\n"
        try:
            with open(self._path, "ab+", buffering=0) as file:
                size = file.seek(0, os.SEEK_END)
                try:
                    _write(file, _end_of_last_line(file, size) + self._waiting)
                except OSError:
                    file.truncate(size)
                    raise
        except OSError as error:
            self._warn_once(f"{self._path} cannot be written ({error.strerror or error})", "make room")
        else:
            self._waiting = b""

    @contextmanager
    def _going_on_without(self, logger: MetricsLogger) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            self._warn_once(f"{type(logger).__name__} failed ({reason})", "see what it needs")

    def _warn_once(self, what: str, remedy: str) -> None:
        if what not in self._told:
            self._told.add(what)
            self._warn(f"warning: {what}: the run goes on without; {remedy}.")


def _end_of_last_line(file: FileIO, size: int) -> bytes:
    """What it lacks: a run that was killed may have left half a line, which would spoil the next."""
    if not size:
        return b""
    file.seek(-1, os.SEEK_END)
    return b"" if file.read(1) == b"\n" else b"\n"


def _write(file: FileIO, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def _in_tensorboard(logger: Any, samples: Sequence[Sample], progress: Progress) -> None:
    for sample in samples:
        # indented text is shown as it is in TensorBoard's Markdown
        parts = (
            ("prompt", sample.prompt),
            ("human", sample.chosen),
            (f"generated ({sample.finish_reason})", sample.rejected),
        )
        text = "\n\n".join(
            f"**{name}**\n\n" + "\n".join(f"    {line}" for line in part.splitlines()) for name, part in parts
        )
        logger.experiment.add_text(f"samples/{sample.index}", text, progress.step)


def _in_wandb(logger: Any, samples: Sequence[Sample], progress: Progress) -> None:
    columns = ["iteration", "index", "prompt", "human", "generated", "finish_reason"]
    rows = [[progress.iteration, s.index, s.prompt, s.chosen, s.rejected, s.finish_reason] for s in samples]
    logger.log_table(key=f"samples/iteration-{progress.iteration:03d}", columns=columns, data=rows, step=progress.step)


def _in_mlflow(logger: Any, samples: Sequence[Sample], progress: Progress) -> None:
    text = json.dumps(
        [{name: getattr(s, name) for name in Sample.__slots__} for s in samples], indent=2, ensure_ascii=False
    )
    logger.experiment.log_text(logger.run_id, text, f"samples/iteration-{progress.iteration:03d}.json")


# by the name of the class, because importing it means importing what may not be installed
_SHOW = {"TensorBoardLogger": _in_tensorboard, "WandbLogger": _in_wandb, "MLFlowLogger": _in_mlflow}
