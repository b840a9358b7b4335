"""What a run shows on the terminal: progress bars, samples, a table of its iterations. Metrics go on to the log.

Only the process that is given `is_main` shows anything; on the others every method does nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from nemo_spin.config import SpinConfig
from nemo_spin.reporting.events import GuardWarning, Sample
from nemo_spin.reporting.metrics_log import MetricsLog
from nemo_spin.runtime.progress import Progress
from nemo_spin.runtime.timing import in_words

_TABLE = [
    ("after", "{}", None),
    ("step", "{:.0f}", "step"),
    ("val_loss", "{:.4f}", "val_loss"),
    ("loss", "{:.4f}", "loss"),
    ("margin", "{:+.3f}", "rewards/margins"),
    ("accuracy", "{:.3f}", "rewards/accuracies"),
    ("held-out accuracy", "{:.3f}", "val/rewards/accuracies"),
    ("gap before", "{:+.3f}", "equilibrium/logps_gap"),
    ("response tokens", "{:.1f}", "rollout/length"),
    ("cut off", "{:.1%}", "rollout/finish_reason_length"),
    ("time in rollouts", "{:.0%}", "time/rollout_share"),
]
_BAR = ["loss", "rewards/margins", "rewards/accuracies", "val_loss", "grad_norm"]
_SAMPLE_WIDTH = 110


class Reporter:
    """Shows a run to people and passes its metrics to the log."""

    def __init__(self, is_main: bool, log: MetricsLog | None = None) -> None:
        """log: where metrics go, on the one process that writes them."""
        self.is_main = is_main
        self._log = log or MetricsLog()  # which has nowhere to write to
        self.rows: list[dict[str, Any]] = []
        self._bar: Any = None

    @contextmanager
    def run(self, cfg: SpinConfig, progress: Progress, total_steps: int) -> Iterator[None]:
        """Around the whole run, of so many steps: ends bars also when the run ends by an error."""
        each = cfg.loop.max_epochs
        epochs = ", ".join(map(str, each if len(set(each)) > 1 else each[:1]))
        self.say(
            f"SPIN: {cfg.loop.max_iterations} iterations of {epochs} epochs, starting at "
            f"iteration {progress.iteration}, step {progress.step}"
        )
        self.log("start" if progress.step == 0 else "resume", progress, {}, total_steps=total_steps)
        try:
            yield
        finally:
            self._close_bar()

    def say(self, message: str) -> None:
        """One line for people."""
        if self.is_main:
            tqdm.write(message, file=sys.stderr)

    def log(self, kind: str, progress: Progress, metrics: dict[str, float], **position: int) -> None:
        """Write metrics to the log; see `MetricsLog.write`."""
        self._log.write(kind, progress, metrics, **position)

    def end(self, progress: Progress, reason: str) -> None:
        """Write to the log that the run is at its end. reason: why before its last step, empty where it is not."""
        self._log.write_text("end", progress, {"reason": reason} if reason else {})

    def warn(self, warning: GuardWarning, progress: Progress) -> None:
        """Show what a guard has seen, and write it to the log."""
        self.say(f"warning: {warning.text}")
        self._log.write_text("warning", progress, {"guard": warning.guard, "text": warning.text})

    def step(self, progress: Progress, epoch: int, metrics: dict[str, float], total: int, seconds_left: float) -> None:
        """Show an optimizer step, one of `total` in its iteration; `progress` has counted it already.

        seconds_left: to the end of the run.
        """
        position = {"iteration_step": progress.iteration_step, "consumed_samples": progress.consumed_samples}
        self.log("train", progress, metrics, epoch=epoch, **position)
        if not self.is_main:
            return
        if self._bar is None:
            self._bar = tqdm(
                total=total, initial=progress.iteration_step - 1, desc=f"iteration {progress.iteration}: training"
            )
        shown = {name: f"{metrics[name]:.4g}" for name in _BAR if name in metrics}
        self._bar.set_postfix(shown | {"run left": in_words(seconds_left)}, refresh=False)
        self._bar.update()

    @contextmanager
    def rollouts(self, iteration: int, examples: int, what: str = "rollouts") -> Iterator[Callable[[str, int], None]]:
        """A bar of the responses. Yields a function (phase, how many more are done)."""
        with tqdm(total=examples, desc=f"iteration {iteration}: {what}", disable=not self.is_main) as bar:

            def advance(phase: str, count: int) -> None:
                bar.set_postfix_str(phase, refresh=False)
                # both responses of an example are scored: they would count twice
                if phase == "generating":
                    bar.update(min(count, examples - bar.n))

            yield advance

    def samples(self, samples: Sequence[Sample], progress: Progress) -> None:
        """Show generated responses beside the human ones."""
        if not self.is_main:
            return
        for sample in samples:
            for name, text in (("prompt", sample.prompt), ("human", sample.chosen), ("generated", sample.rejected)):
                self.say(f"{name:>9}  {_shortened(text, from_the_end=name == 'prompt')}")
            self.say("")
        self._log.write_samples(samples, progress)

    def iteration(self, progress: Progress, label: str, metrics: dict[str, float]) -> None:
        """Add a row to the table and show the table so far."""
        self._close_bar()
        self.rows.append({"after": label, "step": progress.step, **metrics})
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


def _shortened(text: str, from_the_end: bool) -> str:
    """A text in one line. Of a prompt the end is what is answered."""
    line = " ".join(text.split())
    if len(line) <= _SAMPLE_WIDTH:
        return line
    return "..." + line[3 - _SAMPLE_WIDTH :] if from_the_end else line[: _SAMPLE_WIDTH - 3] + "..."
