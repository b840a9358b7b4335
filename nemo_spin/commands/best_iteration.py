"""Which iteration of a run was the best, said with the figures of all; and its weights back in the model.

The figures of iterations are those of their checkpoints, so that a run which was interrupted says the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_spin.checkpoint.manager import faults_in
from nemo_spin.checkpoint.run_state import Stored, stored_in
from nemo_spin.config import CheckpointConfig
from nemo_spin.errors import UserError
from nemo_spin.model_io.stores.torch_dist import TorchDistStore
from nemo_spin.model_io.weights import load_weights
from nemo_spin.reporting.metrics_log import FILE_NAME
from nemo_spin.reporting.page.history import read_history
from nemo_spin.runtime.collectives import of_first
from nemo_spin.runtime.progress import Progress
from nemo_spin.runtime.watchdog import beat

if TYPE_CHECKING:
    from nemo_spin.model import MegatronGPTSPINModel
    from nemo_spin.trainer import SPINTrainer

SFT_MODEL = "SFT model"


@dataclass(frozen=True, slots=True)
class Figure:
    """The monitored metric of a policy. name: for people. checkpoint: None for the SFT model."""

    name: str
    value: float
    checkpoint: Stored | None = None


def ranked(figures: Sequence[Figure], mode: str) -> list[Figure]:
    """The best first, of equals the earlier. mode: "min" or "max"."""
    return sorted(figures, key=lambda figure: figure.value if mode == "min" else -figure.value)


def figures_of(stored: Sequence[Stored], monitor: str, sft_value: float | None = None) -> list[Figure]:
    """The SFT model's, where it is known, then those of the checkpoints that have the metric, in the order of steps.

    An iteration has the name of its number; a checkpoint within one that of its step as well.
    """
    figures = [] if sft_value is None else [Figure(SFT_MODEL, sft_value)]
    at = {s.position: s for s in sorted(stored, key=lambda s: s.age)}
    for checkpoint in at.values():
        value = checkpoint.metrics.get(monitor, math.nan)
        if math.isfinite(value):
            figures.append(Figure(_name(checkpoint.progress), value, checkpoint))
    return figures


def _name(progress: Progress) -> str:
    # a checkpoint of an iteration's end stands at the start of the next
    if progress.iteration_step == 0:
        return f"iteration {progress.iteration - 1}"
    return f"step {progress.step} of iteration {progress.iteration}"


def best_in_words(figures: Sequence[Figure], monitor: str, mode: str) -> str:
    """Which is best, among which, and a caution where that says little; empty where no checkpoint has the metric."""
    checkpoints = ranked([figure for figure in figures if figure.checkpoint is not None], mode)
    if not checkpoints:
        return ""
    best = checkpoints[0]
    # those within iterations may be many: of them the best is of interest, and the last, where max_steps ended the run
    listed = [f for f in figures if f is best or f is figures[-1] or not f.name.startswith("step")]
    all_of_them = ", ".join(f"{figure.name} {figure.value:.4f}" for figure in listed)
    extreme = "lowest" if mode == "min" else "highest"
    if ranked(figures, mode)[0].checkpoint is None:
        sft = ranked(figures, mode)[0]
        found = (
            f"Best {monitor}: {sft.value:.4f}, of the SFT model itself, the {extreme} of {all_of_them}: by this figure "
            f"no iteration has improved on it, and the best checkpoint is that of {best.name} ({_place(best)})."
        )
    else:
        found = (
            f"Best {monitor}: {best.value:.4f} after {best.name} ({_place(best)})"
            + (f", the {extreme} of {all_of_them}" if len(listed) > 1 else "")
            + "."
        )
    if monitor != "val_loss":
        found += (
            f" {monitor} compares each policy with its own opponent, so it says how well an iteration learned, and not "
            "which iteration's policy is better: for that, look at val_loss or at an evaluation of your own."
        )
    return found


def _place(figure: Figure) -> str:
    return f"checkpoints/{figure.checkpoint.path.name}"


# ------------------------------------------------------------------------------------------------ at the end of a run


def settle_on_best(options: CheckpointConfig, model: MegatronGPTSPINModel, trainer: SPINTrainer) -> None:
    """Say which iteration is the best and, with `save_best_model`, leave its weights in the model; every process calls.

    The checkpoints, and what a run goes on from, stay as they are.
    """
    say, directory = trainer.reporter.say, trainer.checkpoints.directory

    def look() -> list[Figure]:
        stored, _ = stored_in(directory)
        return figures_of(stored, options.monitor, _sft_value(trainer.run_dir / FILE_NAME, options.monitor))

    figures = of_first(look)
    if words := best_in_words(figures, options.monitor, options.mode):
        say(words)
    if options.save_best_model:
        best_first = [figure.checkpoint for figure in ranked(figures, options.mode) if figure.checkpoint is not None]
        _load_first_whole(best_first, model, trainer)


def _load_first_whole(best_first: Sequence[Stored], model: MegatronGPTSPINModel, trainer: SPINTrainer) -> None:
    """Into the model, whose weights are the last ones; every process calls. Says what is passed over, and why."""
    say, here = trainer.reporter.say, (trainer.progress.step, trainer.progress.iteration)
    for stored in best_first:
        path, name = stored.path, _name(stored.progress)
        if stored.position == here:
            say(f"What is written are the weights after {name}, which are the last ones.")
            return
        if not (faults := faults_in(path)):
            beat("loading the best checkpoint")
            load_weights(model.gpt, TorchDistStore(path / "shards", "", str(path)), str(path))
            say(f"What is written are the weights after {name}, the best ones ({path}), and not the last.")
            return
        say(f"warning: {path} is damaged ({faults[0]}): it is passed over for the next best.")
    say("warning: no whole checkpoint has the metric by which one is best: what is written are the last weights.")


def _sft_value(metrics_file: Path, monitor: str) -> float | None:
    """The metric of the SFT model, which is validated before the first step; None where that is not known.

    A run logs it once; one that is resumed finds it in the log, if that is still there.
    """
    try:
        records = read_history(metrics_file).records
    except UserError:
        return None
    values = [r.metrics[monitor] for r in records if r.kind == "validation" and r.step == 0 and monitor in r.metrics]
    return values[-1] if values and math.isfinite(values[-1]) else None
