"""The run in rows and cells: its headline, its iterations, and every metric that it logged."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from pathlib import PurePath
from typing import Any

from nemo_spin.reporting.page.figures import DRAWN
from nemo_spin.reporting.page.run_directory import Run

# metric, title, format
_COLUMNS = (
    ("loss", "loss", "{:.4f}"),
    ("rewards/margins", "margin", "{:+.3f}"),
    ("rewards/accuracies", "accuracy", "{:.3f}"),
    ("val/rewards/accuracies", "held-out accuracy", "{:.3f}"),
    ("rewards/chosen", "chosen reward", "{:+.3f}"),
    ("rewards/rejected", "rejected reward", "{:+.3f}"),
    ("logps/chosen", "chosen log-prob.", "{:.1f}"),
    ("kl", "KL (nats)", "{:.2f}"),
    ("val_loss", "val_loss", "{:.4f}"),
    ("rollout/responses", "responses", "{:,.0f}"),
    ("rollout/length", "tokens each", "{:.1f}"),
    ("rollout/finish_reason_length", "cut off", "{:.1%}"),
    ("rollout/exact_match", "equal to human", "{:.1%}"),
    ("equilibrium/logps_gap", "gap before", "{:+.3f}"),
    ("equilibrium/token_overlap", "overlap before", "{:.3f}"),
    ("time/rollout_share", "rollouts' time", "{:.0%}"),
)


def headline(run: Run) -> list[tuple[str, str]]:
    """What a reader wants to know first: names and values. Only what the run directory says."""
    records, resumes = run.history.records, run.history.resumes
    facts = {
        "State": run.state,
        "Ended": run.end_reason,
        "Model": _text(run.get("pretrained_checkpoint.restore_from_path")),
        "Layout": _layout(run),
        "Data": _text(run.get("model.data.train_ds.file_path")),
        "Training": _training(run),
        "beta": _text(run.get("model.spin.ref_policy_kl_penalty")),
        "Learning rate": _text(run.get("model.optim.lr")),
        "First line": _time(records[0].time),
        "Last line": _time(max(record.time for record in records)),
        "Resumed": resumes and f"{_times(resumes)}; {run.history.undone:,} undone lines do not count",
        "Result": ", ".join(f"checkpoints/{name}" for name in run.nemo_files) or "no .nemo file yet",
        "Newest checkpoint": run.latest and f"checkpoints/{run.latest}",
    }
    return [(name, value) for name, value in facts.items() if value]


def title(run: Run) -> str:
    model = run.get("pretrained_checkpoint.restore_from_path")
    return PurePath(str(model)).name if model else run.path.resolve().name


def iterations(run: Run) -> tuple[list[str], list[list[str]]]:
    """Titles of the columns, and a row for the model before training, if it was validated, and for each iteration."""
    history = run.history
    # one before which the run ended has its figures, and no steps
    measured = {record.iteration for record in history.records if record.kind == "equilibrium"}
    steps: dict[int, list[int]] = {i: [] for i in sorted(measured.union(history.iterations()))}
    for record in history.records:
        if record.kind == "train":
            steps[record.iteration].append(record.step)
    at_start = [value for step, value in history.series("val_loss").finite() if step == 0]
    columns = [column for column in _COLUMNS if any(history.last(column[0], i) is not None for i in steps)]
    rows = []
    if at_start:
        cells = [f"{at_start[0]:.4f}" if metric == "val_loss" else "-" for metric, _, _ in columns]
        rows.append(["before", "-", "-", *cells])
    for iteration, own in steps.items():
        beta = run.per_iteration("model.spin.ref_policy_kl_penalty", iteration)
        values = [(form, history.last(metric, iteration)) for metric, _, form in columns]
        span = f"{min(own):,} to {max(own):,}" if own else "-"
        cells = ["-" if value is None else form.format(value) for form, value in values]
        rows.append([str(iteration), span, "-" if beta is None else f"{beta:g}", *cells])
    return ["iteration", "steps", "beta", *(name for _, name, _ in columns)], rows


def metrics(run: Run) -> list[list[str]]:
    """For every metric: name, points, first, last, smallest, largest value, how many are no numbers, drawn or not."""
    rows = []
    for name in run.history.names():
        series = run.history.series(name)
        values = [value for value in series.values if math.isfinite(value)]
        if values:
            numbers = [f"{value:.6g}" for value in (values[0], values[-1], min(values), max(values))]
        else:
            numbers = ["-"] * 4
        not_finite = len(series) - len(values)
        rows.append([name, f"{len(series):,}", *numbers, f"{not_finite:,}", "yes" if name in DRAWN else "no"])
    return rows


def notes(run: Run) -> list[list[str]]:
    """Texts that lines carry beside numbers: step, kind, name, text."""
    return [
        [f"{record.step:,}", record.kind, name, text]
        for record in run.history.records
        for name, text in record.notes.items()
    ]


def _layout(run: Run) -> str | None:
    nodes, devices = run.number("trainer.num_nodes"), run.number("trainer.devices")
    if not nodes or not devices:
        return None
    processes = int(nodes * devices)
    tensor = int(run.number("model.tensor_model_parallel_size") or 1)
    pipeline = int(run.number("model.pipeline_model_parallel_size") or 1)
    layout = f"{processes} process{'es' if processes > 1 else ''}: tensor {tensor} x pipeline {pipeline}"
    if tensor * pipeline and processes % (tensor * pipeline) == 0:
        layout += f" x data {processes // (tensor * pipeline)}"
    if run.get("model.sequence_parallel") is True:
        layout += ", sequence parallel"
    precision = run.get("trainer.precision")
    return f"{layout}, precision {precision}" if precision else layout


def _training(run: Run) -> str | None:
    batch, epochs = run.get("model.global_batch_size"), run.get("trainer.spin.max_epochs")
    consumed = [r.position["consumed_samples"] for r in run.history.records if "consumed_samples" in r.position]
    parts = (
        f"{run.max_iterations} iterations" if run.max_iterations else "",
        _epochs(epochs),
        f"{batch} pairs in a batch" if batch else "",
        f"{max(consumed):,} pairs so far" if consumed else "",
    )
    return ", ".join(filter(None, parts)) or None


def _epochs(value: Any) -> str:
    if isinstance(value, list) and len(set(map(str, value))) > 1:
        return f"{_text(value)} epochs"
    each = value[0] if isinstance(value, list) and value else value
    return f"{each} epochs each" if each else ""


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _text(value: Any) -> str | None:
    if value is None:
        return None
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _time(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (OverflowError, ValueError, OSError):
        return "unknown"
