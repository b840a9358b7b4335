"""This project beside transformers and TRL: the same weights, data and settings, in turns.

    python benchmarks/peers/compare.py [--rounds 3] [--threads 2] [--quick] [--json FILE] [--pip-args ...]

On the CPU, in fp32. The peers get an environment of their own, made once. Each side is a process that stays, and only
one of them computes at a time: ours, theirs, ours, theirs ... A figure is the median over the rounds, a ratio the
median of the ratios within a round, so that other work on the machine, which slows both, changes it little. Memory is
measured in fresh processes. Before anything is measured the two sides' log-probabilities have to agree.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import environment
import findings
import workloads
from findings import Line
from protocol import Answer, Worker
from settings import PAIRS_PER_STEP, SEED
from workloads import MAIN, WORKLOADS, Texts, Workload

HERE = Path(__file__).resolve().parent
DEFAULT_FOLDER = HERE.parents[1] / ".venv-peers"
BATCHES = (16, 32, 64, 128, 256)
NATS_PER_TOKEN = 1e-4
BARS_OF_GENERATION = {True: 1.0, False: 2.5}
"""By whether lengths are equal."""


class Comparison:
    """Asks both sides. directory: gets the data of the workloads, and the logs."""

    def __init__(self, python: Path, model: Path, directory: Path, threads: int) -> None:
        self._commands = {
            "ours": [sys.executable, str(HERE / "ours.py"), str(model), str(threads)],
            "theirs": [str(python), str(HERE / "theirs.py"), str(model), str(threads)],
        }
        self._directory, self._threads = directory, threads
        self._ours: Worker | None = None
        self._theirs: Worker | None = None

    @contextmanager
    def workers(self, steady_memory: bool = False) -> Iterator[tuple[Worker, Worker]]:
        """Fresh processes of both sides."""
        variables = environment.variables(os.environ, self._threads, self._directory, steady_memory)
        with (
            Worker("ours", self._commands["ours"], variables, self._directory / "ours.log") as ours,
            # This environment's packages are none of theirs.
            Worker(
                "theirs",
                self._commands["theirs"],
                {name: value for name, value in variables.items() if name != "PYTHONPATH"},
                self._directory / "theirs.log",
            ) as theirs,
        ):
            yield ours, theirs

    def write(self, workload: Workload) -> tuple[dict[str, str], Texts]:
        """What commands are told of a workload, and its texts."""
        directory = self._directory / workload.name.replace(", ", "-")
        texts = workloads.texts(workload, SEED)
        workloads.write(texts, directory)
        return {"name": workload.name, "data": str(directory)}, texts

    # ------------------------------------------------------------------------------------------ what is measured

    def check(self, ours: Worker, theirs: Worker) -> None:
        """Both sides give every answer the same log-probability: they have the same weights, and read the same ids."""
        told, texts = self.write(WORKLOADS[MAIN])
        found = [side.ask("logps", **told) for side in (ours, theirs)]
        for kind, answers in (("chosen", texts.chosen), ("rejected", texts.rejected)):
            for ids, a, b in zip(answers[:PAIRS_PER_STEP], found[0][kind], found[1][kind], strict=True):
                # TRL puts an EOS after an answer that was cut off.
                if ids[-1] == workloads.EOS_ID and abs(a - b) > NATS_PER_TOKEN * len(ids):
                    raise SystemExit(f"The sides differ: a {kind} answer of {len(ids)} tokens has {a} and {b} nats.")

    def memory(self, workload: Workload) -> list[Line]:
        told, _ = self.write(workload)
        with self.workers(steady_memory=True) as (ours, theirs):
            peaks = [side.ask("memory", **told, precompute=False) for side in (ours, theirs)]
        return findings.memory_below(workload.name, peaks[0]["peak"], peaks[1]["peak"], peaks[0]["weights"])

    def generation(
        self, ours: Worker, theirs: Worker, workload: Workload, batches: tuple[int, ...], rounds: int
    ) -> tuple[list[Line], tuple[int, int]]:
        """Both at the batch size that is fastest for them. Returns these too."""
        told, _ = self.write(workload)
        tried = [batch for batch in batches if batch <= workload.pairs] or [workload.pairs]
        best = []
        for side in (ours, theirs):
            side.ask("generate", **told, batch=tried[0])  # whatever happens at the first call
            answers = {batch: side.ask("generate", **told, batch=batch) for batch in tried}
            best.append(max(tried, key=lambda batch: answers[batch]["tokens"] / answers[batch]["seconds"]))
        pairs = [(ours.ask("generate", **told, batch=best[0]), theirs.ask("generate", **told, batch=best[1]))
                 for _ in range(rounds)]  # fmt: skip
        against = f"transformers, batch {best[1]} (ours {best[0]})"
        bar = BARS_OF_GENERATION[workload.equal]
        useful = [min(a["useful"] for a, _ in pairs), min(b["useful"] for _, b in pairs)]
        lines = [
            findings.rate(workload.name, "generated", _tokens(pairs), _seconds(pairs), bar, against),
            Line(workload.name, "useful share of slots", "", useful[0], useful[1], None, 0.9, against),
        ]
        return lines, (best[0], best[1])

    def training(
        self, ours: Worker, theirs: Worker, workload: Workload, rounds: int, without_precompute: bool
    ) -> list[Line]:
        told, texts = self.write(workload)
        count = texts.real_tokens
        for side in (ours, theirs):
            side.ask("train", **told, precompute=True, pairs=2 * PAIRS_PER_STEP)
        rows = []
        for _ in range(rounds):
            row = [ours.ask("train", **told), theirs.ask("train", **told, precompute=True)]
            rows.append([*row, theirs.ask("train", **told, precompute=False)] if without_precompute else row)
        tokens = [(count, count)] * rounds
        lines = []
        # Where all lengths are equal there is no padding to save.
        bar_of_training = None if workload.equal else 2.0
        for kind, theirs_at, bar in (("precomputed", 1, bar_of_training), ("not precomputed", 2, None)):
            if theirs_at < len(rows[0]):
                pairs = [(row[0], row[theirs_at]) for row in rows]
                what, against = "trained, set-up counted", f"TRL, reference {kind}"
                lines.append(findings.rate(workload.name, what, tokens, _seconds(pairs), bar, against))
        steps_alone = [tuple(row[side]["seconds"] - row[side]["set_up"] for side in (0, 1)) for row in rows]
        lines.append(
            findings.rate(
                workload.name, "trained, steps alone", tokens, steps_alone, None, "TRL, reference precomputed"
            )
        )
        return lines

    def iteration(
        self, ours: Worker, theirs: Worker, workload: Workload, batches: tuple[int, int], rounds: int
    ) -> list[Line]:
        told, _ = self.write(workload)
        pairs = [
            (ours.ask("iteration", **told, batch=batches[0]), theirs.ask("iteration", **told, batch=batches[1]))
            for _ in range(rounds)
        ]
        lines = [findings.duration(workload.name, "a whole iteration", _seconds(pairs), 2.5, "transformers and TRL")]
        for part, name in (
            ("load", "loading"),
            ("rollout", "responses and reference"),
            ("train_step", "steps"),
            ("checkpoint", "saving"),
        ):
            seconds = [(a["parts"].get(part, 0.0), b["parts"].get(part, 0.0)) for a, b in pairs]
            lines.append(replace(findings.duration(workload.name, f"  {name}", seconds, None, ""), ratio=None))
        return lines


def _seconds(pairs: list[tuple[Answer, Answer]]) -> list[tuple[float, float]]:
    return [(a["seconds"], b["seconds"]) for a, b in pairs]


def _tokens(pairs: list[tuple[Answer, Answer]]) -> list[tuple[int, int]]:
    return [(a["tokens"], b["tokens"]) for a, b in pairs]


def starting_model(folder: Path, threads: int) -> Path:
    """The model that both sides start from, made unless it is there."""
    recipe = b"".join((HERE / name).read_bytes() for name in ("starting_model.py", "workloads.py"))
    model = folder / f"model-{hashlib.sha256(recipe).hexdigest()[:12]}"
    if not model.is_dir():
        print("Training the model that both sides start from; this takes a minute or two.", file=sys.stderr, flush=True)
        command = [sys.executable, str(HERE / "starting_model.py"), str(model)]
        variables = environment.variables(os.environ, threads, folder, steady_memory=False)
        subprocess.run(command, check=True, env=variables)
    return model


def measure(comparison: Comparison, rounds: int, quick: bool) -> Iterator[Line]:
    chosen = [workload.reduced(4) if quick else workload for workload in WORKLOADS.values()]
    batches = (16, 64) if quick else BATCHES
    yield from comparison.memory(chosen[0])
    with comparison.workers() as (ours, theirs):
        comparison.check(ours, theirs)
        for workload in chosen[:2] if quick else chosen:
            is_main = workload.name == MAIN
            texts = workloads.texts(workload, SEED)
            print(
                f"{workload.name}: {workload.pairs} pairs, {texts.real_tokens:,} real training tokens, "
                f"{texts.padded_tokens(PAIRS_PER_STEP):,} when padded in batches of {PAIRS_PER_STEP}",
                file=sys.stderr,
                flush=True,
            )
            own_rounds = rounds if is_main else max(1, rounds - 1)
            lines, best = comparison.generation(ours, theirs, workload, batches, own_rounds)
            yield from lines
            yield from comparison.training(ours, theirs, workload, own_rounds, without_precompute=is_main)
            if is_main:
                yield from comparison.iteration(ours, theirs, workload, best, own_rounds)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="This project beside transformers and TRL: same weights, data and settings, in turns."
    )
    add = parser.add_argument
    add("--rounds", type=int, help="default 3, with --quick 1")
    add("--threads", type=int, default=2, help="of each side (default 2)")
    add("--quick", action="store_true", help="a quarter of the data, short texts only: some minutes")
    add("--json", type=Path, help="write the figures to this file too")
    add("--pip-args", default="", help="more arguments of pip install, for the peers' environment")
    add("--folder", type=Path, default=DEFAULT_FOLDER, help="where environment and model are kept (%(default)s)")
    return parser.parse_args()


def main() -> None:
    options = parse()
    started = time.monotonic()
    folder = options.folder.resolve()
    # In a directory of its own, because it is removed when it is made anew.
    python = environment.interpreter(folder / "environment", options.pip_args.split())
    model = starting_model(folder, options.threads)
    rounds = options.rounds or (1 if options.quick else 3)
    software = {name: version(name) for name in ("torch", "megatron-core", "transformers")}
    software |= {"trl": environment.TRL.partition("==")[2], "python": platform.python_version()}
    load = os.getloadavg()[0]
    print(", ".join(f"{name} {number}" for name, number in software.items()))
    print(f"{options.threads} threads, {rounds} rounds, load average {load:.1f} before the start\n", flush=True)
    lines = []
    with tempfile.TemporaryDirectory(prefix="peers_") as scratch:
        comparison = Comparison(python, model, Path(scratch), options.threads)
        for line in measure(comparison, rounds, options.quick):
            lines.append(line)
            print("  ".join(filter(None, line.cells())), file=sys.stderr, flush=True)
    minutes = (time.monotonic() - started) / 60
    print(findings.table(lines))
    missed = sum(line.met is False for line in lines)
    print(f"\n{missed} of {sum(line.bar is not None for line in lines)} bars missed; {minutes:.1f} minutes")
    if options.json:
        record = {"software": software, "threads": options.threads, "rounds": rounds, "quick": options.quick}
        record |= {"load": load, "lines": [asdict(line) | {"met": line.met} for line in lines]}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
