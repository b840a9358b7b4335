"""A run as its directory shows it: what it logged, how it was configured, what it has saved, how far it came."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from nemo_spin.errors import ConfigError, UserError
from nemo_spin.reporting.page.history import History, Record, read_history


@dataclass(frozen=True)
class Run:
    """A run directory.

    config: as run, empty where config.yaml is missing; config_text: the file.
    nemo_files: names in checkpoints/. latest: name of the newest checkpoint, None if there is none.
    """

    path: Path
    history: History
    config: dict[str, Any]
    config_text: str
    nemo_files: list[str]
    latest: str | None

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the configuration by its dotted key."""
        node: Any = self.config
        for part in key.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        return default if node is None else node

    def number(self, key: str) -> float | None:
        """A number of the configuration; YAML reads 9e-6 as text."""
        return _number(self.get(key))

    def per_iteration(self, key: str, iteration: int) -> float | None:
        """A value that is one number, or a list with one for each iteration."""
        value = self.get(key)
        if isinstance(value, list):
            value = value[iteration] if iteration < len(value) else None
        return _number(value)

    @property
    def spin_loss(self) -> str:
        """The metric of SPIN's loss, without an SFT term that may have been added to it."""
        return "spin_loss" if (self.number("model.spin.sft_loss_weight") or 0.0) > 0 else "loss"

    @property
    def loss_at_margin_0(self) -> tuple[float, str]:
        """SPIN's loss where policy and reference are the same, and its name."""
        return (math.log(2.0), "ln 2") if self.get("model.spin.loss_type") in (None, "logistic") else (1.0, "1")

    @property
    def clipped_above(self) -> tuple[float, str] | None:
        """The gradient norm from which steps are clipped, and a label; None where they are not."""
        limit = self.number("trainer.spin.gradient_clip_val") or 0.0
        return (limit, "clipped above") if limit > 0 else None

    def begins_at_reference(self, iteration: int) -> bool:
        """Whether policy and reference are the same when an iteration begins."""
        return iteration == 0 or self.get("model.spin.refresh_reference") is not False

    @property
    def max_iterations(self) -> int | None:
        number = self.number("trainer.spin.max_iterations")
        return None if number is None else int(number)

    @cached_property
    def last_position(self) -> Record:
        """The line that says how far the run came."""
        return max(self.history.records, key=lambda record: (record.step, record.iteration))

    @cached_property
    def total_steps(self) -> int | None:
        """Steps that the whole run is to have, None where the log does not say so."""
        for record in reversed(self.history.records):
            if record.kind in ("start", "resume") and "total_steps" in record.position:
                return record.position["total_steps"]
        return None

    @cached_property
    def has_ended(self) -> bool:
        """Whether the last process of the run came to its end."""
        marks = [record.kind for record in self.history.records if record.kind in ("start", "resume", "end")]
        return bool(marks) and marks[-1] == "end"

    @property
    def end_reason(self) -> str | None:
        """Why the run ended before its last step, in a sentence; None where it has not, or not by itself."""
        ends = [record.notes.get("reason") for record in self.history.records if record.kind == "end"]
        return ends[-1] if ends and self.has_ended else None

    @property
    def is_finished(self) -> bool:
        """Whether the run came to its end and has made all its steps, as far as that is known, or ended by itself."""
        is_whole = self.total_steps is None or self.last_position.step >= self.total_steps
        return self.has_ended and (is_whole or self.end_reason is not None)

    @property
    def state(self) -> str:
        """How far the run came, in words."""
        last = self.last_position
        if self.is_finished:
            return f"finished after {last.step:,} steps"
        of = f" of {self.total_steps:,}" if self.total_steps else ""
        iterations = f" of {self.max_iterations}" if self.max_iterations else ""
        return f"unfinished: at step {last.step:,}{of}, in iteration {last.iteration} (from 0){iterations}"


def read_run(path: Path) -> Run:
    """Read a run directory, but for its rollouts. Raises UserError, DataError or ConfigError."""
    if not path.is_dir():
        what = "is not a directory" if path.exists() else "does not exist"
        raise UserError(f"{path} {what}: give the directory of a run (exp_manager.explicit_log_dir).")
    metrics = path / "metrics.jsonl"
    if not metrics.is_file():
        parts = ("metrics.jsonl", "config.yaml", "checkpoints")
        lacks = [part for part in parts if not (path / part).exists()] or ["metrics.jsonl as a file"]
        raise UserError(
            f"{path} is not the directory of a run, it lacks {', '.join(lacks)}: give the one that training wrote to "
            "(exp_manager.explicit_log_dir)."
        )
    history = read_history(metrics)
    config_text, config = _read_config(path / "config.yaml")
    checkpoints = path / "checkpoints"
    pointer = checkpoints / "latest"
    try:
        nemo_files = sorted(file.name for file in checkpoints.glob("*.nemo"))
        latest = pointer.read_text(encoding="utf-8", errors="replace").strip() if pointer.is_file() else None
    except OSError as error:
        raise UserError(f"{checkpoints} cannot be read ({error.strerror}): make it readable.") from None
    return Run(path, history, config, config_text, nemo_files, latest)


def _read_config(path: Path) -> tuple[str, dict[str, Any]]:
    if not path.is_file():
        return "", {}
    try:
        text = path.read_text(encoding="utf-8")
        config = yaml.safe_load(text)
        reason = None if isinstance(config, dict) else "is not a mapping of keys to values"
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = f"cannot be read ({' '.join(str(error).split())})"
    if reason:
        raise ConfigError(f"{path} {reason}: mend it, or move it away for a report without.")
    return text, config


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None
