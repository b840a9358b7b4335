"""Runs over several processes: SFT models before what starts from them, and nothing that has been made already."""

from __future__ import annotations

import multiprocessing
import time
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from results import Result, Results, Row
from worker import work

if TYPE_CHECKING:
    from experiments import Job, Scale, Variant
    from tasks import Task


@dataclass
class _Worker:
    process: Any
    connection: Any
    job: Job | None = None


class Scheduler:
    """variants: what to run. output: where results are. workers, threads: processes, and threads of each."""

    def __init__(
        self,
        variants: list[Variant],
        output: Path,
        scale: Scale,
        known: dict[str, Task],
        gsm8k: Path | None,
        workers: int,
        threads: int,
    ) -> None:
        from experiments import key_of

        self._key_of = lambda job: key_of(job, scale, known)
        self.output, self.arguments = output, (output, scale.name, gsm8k, threads)
        self.results = Results(output / "results")
        self.names = {job: variant.name for variant in variants for job in variant.jobs()}
        starts = [job.start for job in self.names if job.start is not None]
        self.waiting = [job for job in dict.fromkeys([*starts, *self.names]) if not self._is_made(job)]
        self.in_all = len(self.waiting)
        self.number_of_workers = min(workers, max(len(self.waiting), 1))
        self._context = multiprocessing.get_context("spawn")

    def run(self, started: float) -> None:
        """Until nothing is left. Whatever ends this, ends the workers."""
        if not self.waiting:
            return
        workers = [self._start() for _ in range(self.number_of_workers)]
        done = 0
        try:
            while self.waiting or any(worker.job for worker in workers):
                for worker in workers:
                    if worker.job is None and (job := self._next(workers)) is not None:
                        worker.job = job
                        worker.connection.send(job)
                ready = wait([w.connection for w in workers if w.job] + [w.process.sentinel for w in workers if w.job])
                for number, worker in enumerate(workers):
                    if worker.job is None or not {worker.connection, worker.process.sentinel} & set(ready):
                        continue
                    job, worker.job = worker.job, None
                    if not self._has_answered(worker):
                        self._note_death(job, worker.process)
                        workers[number] = self._start()
                    done += 1
                    self._tell(job, done, started)
            for worker in workers:
                worker.connection.send(None)
                worker.process.join(timeout=30)
        finally:
            for worker in workers:
                worker.process.terminate()
            for worker in workers:
                worker.process.join(timeout=10)
                worker.process.kill()
                worker.process.join()

    def _start(self) -> _Worker:
        here, there = self._context.Pipe()
        process = self._context.Process(target=work, args=(there, *self.arguments), daemon=True)
        process.start()
        there.close()
        return _Worker(process, here)

    def _next(self, workers: list[_Worker]) -> Job | None:
        """The first job whose starting model is there; one whose starting model failed fails at once."""
        under_way = {worker.job for worker in workers if worker.job}
        for job in self.waiting:
            start = job.start
            if start is None or not (start in self.waiting or start in under_way):
                self.waiting.remove(job)
                return job
        return None

    @staticmethod
    def _has_answered(worker: _Worker) -> bool:
        try:
            worker.connection.recv()
        except (EOFError, ConnectionResetError):
            return False
        return True

    def _note_death(self, job: Job, process: Any) -> None:
        from dataclasses import asdict

        process.join(timeout=10)
        error = f"the process that made this run ended with exit code {process.exitcode}"
        self.results.put(self._key_of(job), asdict(job), Result((), {}, error))

    def _is_made(self, job: Job) -> bool:
        result = self.results.get(self._key_of(job))
        if result is None or result.error is not None:
            return False
        return job.kind != "start" or (self.output / "models" / f"{self._key_of(job)}.nemo").exists()

    def _tell(self, job: Job, done: int, started: float) -> None:
        result = self.results.get(self._key_of(job))
        passed = time.monotonic() - started
        left = passed / done * (self.in_all - done)
        name = self.names.get(job, f"{job.task} {job.kind}")
        print(
            f"[{passed / 60:5.1f} min, about {left / 60:.0f} left] {done}/{self.in_all} {name}, seed {job.seed}: "
            f"{_in_short(result)}",
            flush=True,
        )


def _in_short(result: Result | None) -> str:
    if result is None or result.error is not None:
        return f"FAILED: {result.error if result else 'no result'}"
    figures = ", ".join(_headline(row) for row in result.rows)
    return f"{result.seconds['all']:.0f} s ({result.seconds['cpu']:.0f} of CPU), {figures}"


def _headline(row: Row) -> str:
    return f"{row.figures.get('kl', row.figures.get('accuracy', row.figures.get('nll', 0.0))):.3f}"
