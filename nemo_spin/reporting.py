"""What a run shows: progress bars and a table on the terminal, metrics in the loggers that exp_manager attached.

Only the process that is given `is_main` shows anything; on the others every method does nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from tqdm import tqdm

from nemo_spin.config import SpinConfig
from nemo_spin.progress import Progress

_TABLE = [
    ("after", "{}", None),
    ("step", "{:.0f}", "step"),
    ("val_loss", "{:.4f}", "val_loss"),
    ("loss", "{:.4f}", "loss"),
    ("margin", "{:+.3f}", "rewards/margins"),
    ("accuracy", "{:.3f}", "rewards/accuracies"),
    ("response tokens", "{:.1f}", "rollout/length"),
    ("cut off", "{:.1%}", "rollout/finish_reason_length"),
]
_BAR = ["loss", "rewards/margins", "rewards/accuracies", "val_loss", "grad_norm"]


class MetricsLogger(Protocol):
    """A Lightning logger, as far as it is used."""

    def log_metrics(self, metrics: dict[str, float], step: int) -> None: ...


class Reporter:
    """Shows a run to people and writes its metrics to loggers."""

    def __init__(self, is_main: bool, loggers: Sequence[MetricsLogger] = ()) -> None:
        self.is_main = is_main
        self.loggers = list(loggers)
        self.rows: list[dict[str, Any]] = []
        self._bar: Any = None

    @contextmanager
    def run(self, cfg: SpinConfig, progress: Progress) -> Iterator[None]:
        """Around the whole run: ends bars also when the run ends by an error."""
        self.say(
            f"SPIN: {cfg.loop.max_iterations} iterations of {cfg.loop.max_epochs} epochs, starting at iteration "
            f"{progress.iteration}, step {progress.step}"
        )
        try:
            yield
        finally:
            self._close_bar()

    def say(self, message: str) -> None:
        """One line for people."""
        if self.is_main:
            tqdm.write(message, file=sys.stderr)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Write metrics to the loggers. step: optimizer steps done in the run."""
        if self.is_main:
            for logger in self.loggers:
                logger.log_metrics(metrics, step)

    def step(self, progress: Progress, epoch: int, metrics: dict[str, float], total: int) -> None:
        """Show an optimizer step, one of `total` in its iteration; `progress` has counted it already."""
        position = {"iteration": progress.iteration, "epoch": epoch, "consumed_samples": progress.consumed_samples}
        self.log(metrics | position, progress.step)
        if not self.is_main:
            return
        if self._bar is None:
            self._bar = tqdm(
                total=total, initial=progress.iteration_step - 1, desc=f"iteration {progress.iteration}: training"
            )
        self._bar.set_postfix({name: f"{metrics[name]:.4g}" for name in _BAR if name in metrics}, refresh=False)
        self._bar.update()

    @contextmanager
    def rollouts(self, iteration: int, examples: int) -> Iterator[Callable[[str, int], None]]:
        """Bars for the two phases of rollouts. Yields a function (phase, how many more are done)."""
        totals = {"generating": examples, "scoring": 2 * examples}
        bars: dict[str, Any] = {}

        def advance(phase: str, count: int) -> None:
            if not self.is_main:
                return
            if phase not in bars:
                for finished in bars.values():
                    finished.close()
                bars[phase] = tqdm(total=totals[phase], desc=f"iteration {iteration}: {phase}")
            bars[phase].update(min(count, totals[phase] - bars[phase].n))

        try:
            yield advance
        finally:
            for bar in bars.values():
                bar.close()

    def iteration(self, progress: Progress, label: str, metrics: dict[str, float]) -> None:
        """Add a row to the table and show the table so far."""
        self._close_bar()
        self.rows.append({"after": label, "step": progress.step, **metrics})
        self.log(metrics, progress.step)
        self.say("\n" + self.table())

    def table(self) -> str:
        """What every iteration came to, one row each."""
        columns = [column for column in _TABLE if column[2] is None or any(column[2] in row for row in self.rows)]
        cells = [[title for title, _, _ in columns]]
        for row in self.rows:
            values = [(form, row.get(key or "after")) for _, form, key in columns]
            cells.append(["-" if value is None else form.format(value) for form, value in values])
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]]) + "\n"

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
