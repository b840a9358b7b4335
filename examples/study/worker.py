"""A process that makes one run after the other: importing NeMo and megatron-core takes longer than many of them."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from experiments import SCALES, Job, key_of, tasks
from results import Result, Results, Row

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from tasks import Task

    from nemo_spin import MegatronGPTSPINModel


def work(jobs: Connection, output: Path, scale: str, gsm8k: Path | None, threads: int) -> None:
    """Make runs as they are told, until None comes, and answer each with whether it succeeded."""
    # Ctrl-C reaches every process of the terminal: the one that has started this one ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)
    import nemo_spin.cli.silence_libraries  # noqa: F401

    laboratory = Laboratory(output, scale, gsm8k)
    while (job := jobs.recv()) is not None:
        jobs.send(laboratory.run(job))


class Laboratory:
    """output: of the study; gets data/, models/, results/ and, while a run is on, runs/."""

    def __init__(self, output: Path, scale: str, gsm8k: Path | None) -> None:
        self.output = output
        self.scale = SCALES[scale]
        self.tasks = tasks(self.scale, gsm8k)
        self.results = Results(output / "results")
        (output / "models").mkdir(parents=True, exist_ok=True)

    def run(self, job: Job) -> bool:
        """Make the run, unless its result is there, and put its result on disk."""
        key = key_of(job, self.scale, self.tasks)
        started, cpu_before = time.perf_counter(), time.process_time()
        scratch = self.output / "runs" / f"{key}.{os.getpid()}"
        rows: list[Row] = []
        seconds: dict[str, float] = {}
        error = None
        try:
            if job.kind == "language":
                self._language(job, scratch, rows, seconds)
            else:
                self._on_task(job, scratch, rows, seconds)
        except Exception as failure:
            error = "".join(traceback.format_exception_only(failure)).strip()
            traceback.print_exc()
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        seconds["all"] = time.perf_counter() - started
        seconds["others"] = 2 * seconds["all"] - sum(seconds.values())
        seconds["cpu"] = time.process_time() - cpu_before
        self.results.put(key, asdict(job), Result(tuple(rows), seconds, error))
        return error is None

    def _on_task(self, job: Job, scratch: Path, rows: list[Row], seconds: dict[str, float]) -> None:
        import playing
        import starting_models
        from measure import Meter

        from nemo_spin import MegatronGPTSPINModel

        task, data = self.tasks[job.task], data_of(self.output, self.tasks[job.task])
        meter = Meter(task, data, job.seed)

        def look(model: MegatronGPTSPINModel, iteration: int, step: int, logged: dict[str, float]) -> None:
            started = time.perf_counter()
            figures = meter.measure(model) | {f"train/{name}": value for name, value in logged.items()}
            rows.append(Row(iteration, step, figures))
            seconds["measuring"] = seconds.get("measuring", 0.0) + time.perf_counter() - started

        started = time.perf_counter()
        if job.kind == "start":
            path = self._model(job)
            model = starting_models.make_starting_model(task, data, task.shapes[job.shape], job.seed, path)
            seconds["SFT"] = time.perf_counter() - started
            look(model, -1, task.sft.steps, {})
            return
        start = self._model(job.start)
        file = task.train_file(data, job.examples)
        if job.kind == "sft":
            model = MegatronGPTSPINModel.restore_from(str(start))
            dataset = starting_models.read(task, model, data, file)
            starting_models.train_on(
                task, model, dataset, job.rounds, job.lr, job.seed, lambda number, step: look(model, number, step, {})
            )
            seconds["SFT"] = time.perf_counter() - started - seconds["measuring"]
            return
        overrides = (f"model.data.train_ds.file_path={file}", f"model.seed={job.seed}", *task.overrides, *job.overrides)
        seconds |= playing.play(start, overrides, scratch, task.context, data / "cache", look)

    def _language(self, job: Job, scratch: Path, rows: list[Row], seconds: dict[str, float]) -> None:
        import toy_language

        for row in toy_language.run(job, scratch, seconds, self.scale.toy_sft_steps):
            rows.append(Row(*row))

    def _model(self, job: Job) -> Path:
        return self.output / "models" / f"{key_of(job, self.scale, self.tasks)}.nemo"


def data_of(output: Path, task: Task) -> Path:
    """Of the sizes that the task has at this scale."""
    return output / "data" / f"{task.name}-{task.train}-{task.held_out}"
