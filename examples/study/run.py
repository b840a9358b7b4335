"""The study: what the SPIN paper claims, looked up at a scale that two cores can do.

    make study                                            or, in an environment with the package and its extra `study`:
    python examples/study/run.py [--fast | --full] [--gsm8k DIRECTORY] [--output DIRECTORY]

1. data and tokenizers        numbers_task.py, gsm8k_task.py
2. SFT models, then all runs  experiments.py is the table of them; worker.py makes them, in several processes
3. verdicts                   claims.py, by rules that were fixed before the first run on these seeds
4. the report                 page.py (HTML), document.py (docs/study.md with --write-docs)

Finished runs are kept in the output directory: an interrupted study goes on where it was.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import experiments
import gsm8k_task
from scheduling import Scheduler
from worker import data_of

from nemo_spin.cli.launch import guarded
from nemo_spin.errors import UserError

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[1]
MARK = "# made by nemo_spin's study, which removes this directory with --fresh\n*\n"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What the SPIN paper claims, at a small scale.")
    add = parser.add_argument
    scale = parser.add_mutually_exclusive_group()
    scale.add_argument("--fast", action="store_const", const="fast", dest="scale", help="minutes; says nothing")
    scale.add_argument("--full", action="store_const", const="full", dest="scale", help="a GPU or a night")
    add("--gsm8k", type=Path, help="directory with GSM8K's train.jsonl and validation.jsonl (default: a few places)")
    add("--no-gsm8k", action="store_true", help="leave real text out")
    add("--output", type=Path, default=HERE / "out", help="directory to write (default: out/ beside this file)")
    add("--workers", type=int, default=2, help="processes that make runs (default 2)")
    add("--threads", type=int, default=1, help="threads of each (default 1)")
    add("--only", help="runs whose name begins so, for trying; no report")
    add("--fresh", action="store_true", help="forget the runs that are there")
    add("--write-docs", action="store_true", help="write docs/study.md as well")
    parser.set_defaults(scale="normal")
    return parser.parse_args(arguments)


def make_directory(directory: Path, fresh: bool) -> None:
    """Also where an interrupted study is; one of something else is left alone."""
    mark = directory / ".gitignore"
    if directory.exists() and any(directory.iterdir()):
        if not mark.is_file() or mark.read_text(encoding="utf-8") != MARK:
            raise UserError(f"{directory} exists and was not made by the study: move it, or give --output.")
        if fresh:
            shutil.rmtree(directory)
    directory.mkdir(parents=True, exist_ok=True)
    mark.write_text(MARK, encoding="utf-8")


def find_gsm8k(given: Path | None) -> Path | None:
    """The directory given, or one that lies beside the repository. Raises UserError if the one given lacks the data."""
    if given is not None:
        if not gsm8k_task.is_there(given):
            raise UserError(f"--gsm8k {given}: there have to be {' and '.join(gsm8k_task.FILES)} in it.")
        return given
    places = [parent / "shared" / "data" / "gsm8k" for parent in REPO.parents[:2]]
    return next((place for place in places if gsm8k_task.is_there(place)), None)


def main() -> None:
    args = parse()
    if args.write_docs and args.scale == "fast":
        raise UserError(
            "--fast only shows that the study runs, its figures do not belong in docs/: leave out one of the two."
        )
    for received in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(received, signal.default_int_handler)
    # Workers inherit it, and torch looks while it is imported.
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    started = time.monotonic()
    output = args.output.resolve()
    gsm8k = None if args.no_gsm8k else find_gsm8k(args.gsm8k)
    make_directory(output, args.fresh)
    scale = experiments.SCALES[args.scale]
    known = experiments.tasks(scale, gsm8k)
    print(
        f"Real text: {'GSM8K' if gsm8k else 'left out, since GSM8K was not found: give --gsm8k DIRECTORY'}.", flush=True
    )
    for task in known.values():
        task.prepare(data_of(output, task))
    variants = experiments.table(scale, known)
    if args.only:
        variants = [variant for variant in variants if variant.name.startswith(args.only)]
    scheduler = Scheduler(variants, output, scale, known, gsm8k, args.workers, args.threads)
    print(f"Runs to make: {scheduler.in_all}.", flush=True)
    scheduler.run(started)
    if args.only:
        return
    wall = scheduler.results.wall(time.monotonic() - started)
    import document
    import page
    from evidence import Study

    study = Study.read(variants, output, scale, known, wall)
    print("\n" + document.summary(study))
    report = output / "study.html"
    page.write(study, report)
    print(f"Report: {os.path.relpath(report)}")
    if args.write_docs:
        path = REPO / "docs" / "study.md"
        path.write_text(document.document(study), encoding="utf-8")
        print(f"Wrote {os.path.relpath(path)}")
    print(f"[{(time.monotonic() - started) / 60:.1f} min] Done")


if __name__ == "__main__":
    sys.exit(guarded(main))
