"""Checks that NeMo 2 and NeMo 1 themselves read what this project writes; `make check-nemo` runs it.

It makes small checkpoints, installs nemo_toolkit 2.7.3 and 2.4.1 in environments of their own (some GB, the first
time), has NeMo's own code load every checkpoint, compares logits and tokens, and prints a table. Exit status 1 if
anything failed. No GPU is needed; what is replaced for lack of one is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from make_checkpoints import TEXT, Made, make_checkpoints

HERE = Path(__file__).resolve().parent
TOLERANCE = 1e-4
READERS = {"nemo2": "nemo_toolkit 2.7.3", "nemo1": "nemo_toolkit 2.4.1"}


@dataclass
class Outcome:
    reader: str
    name: str
    exercised: str
    difference: float | None
    stubs: list[str]

    @property
    def ok(self) -> bool:
        return self.difference is not None and self.difference <= TOLERANCE

    def row(self) -> list[str]:
        figure = "" if self.difference is None else f"{self.difference:.1e}"
        return [self.reader, self.name, self.exercised, figure, "ok" if self.ok else "FAILED"]


def environment(cache: Path, family: str, python: str, pip_arguments: list[str]) -> Path:
    """The interpreter of an environment with the requirements of a reader, installed unless it is there already."""
    requirements = HERE / f"requirements-{family}.txt"
    folder = cache / family
    stamp = folder / "installed.txt"
    if not stamp.is_file() or stamp.read_text() != requirements.read_text():
        print(f"Installing {READERS[family]} into {folder}; this takes some minutes.", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        interpreter = folder / "bin" / "python"
        if uv := shutil.which("uv"):
            create = [uv, "venv", "--python", python, str(folder)]
            install = [uv, "pip", "install", "--quiet", "--python", str(interpreter)]
        else:
            create = [python, "-m", "venv", str(folder)]
            install = [str(interpreter), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run(create, check=True)
        subprocess.run([*install, *pip_arguments, "--requirement", str(requirements)], check=True)
        stamp.write_text(requirements.read_text())
    return folder / "bin" / "python"


def cases(family: str, made: list[Made], folder: Path) -> Iterator[dict[str, Any]]:
    for checkpoint in made:
        for how in ("load", "export") if checkpoint.exported and family == "nemo2" else ("load",):
            name = f"{family}-{checkpoint.truth.parent.name}-{how}"
            yield {
                "name": checkpoint.name,
                "how": how,
                "path": str(checkpoint.path),
                "truth": str(checkpoint.truth),
                "text": TEXT,
                "ids": checkpoint.ids,
                "override": checkpoint.override,
                "log": str(folder / f"{name}.log"),
                "result": str(folder / f"{name}.json"),
            }


def read(interpreter: Path, family: str, made: list[Made], folder: Path) -> Iterator[Outcome]:
    """Have NeMo read all checkpoints of a family, in a process of its own environment."""
    todo = list(cases(family, made, folder))
    description, log = folder / f"{family}.json", folder / f"{family}.log"
    description.write_text(json.dumps(todo))
    alone = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RANK", "WORLD_SIZE")}
    alone |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    print(f"Reading {len(todo)} checkpoints with {READERS[family]}.", flush=True)
    with open(log, "w") as output:
        command = [str(interpreter), str(HERE / f"read_{family}.py"), str(description)]
        subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=alone, cwd=folder)
    for case in todo:
        result = Path(case["result"])
        if result.is_file():
            found = json.loads(result.read_text())
            yield Outcome(READERS[family], case["name"], found["exercised"], found["difference"], found["stubs"])
            continue
        text = Path(case["log"] if Path(case["log"]).is_file() else log).read_text()
        lines = [line for line in text.splitlines() if line.strip()]
        print(f"{READERS[family]} failed at {case['name']} ({case['how']}):\n  " + "\n  ".join(lines[-12:]))
        yield Outcome(READERS[family], case["name"], case["how"], None, [])


def table(rows: list[list[str]]) -> str:
    rows = [["reader", "checkpoint", "what was exercised", "largest difference", "result"], *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nemo_spin" / "check-nemo"
    parser.add_argument("--cache", type=Path, default=default, help="where the environments are kept (%(default)s)")
    parser.add_argument("--only", choices=READERS, help="one of the readers")
    parser.add_argument("--python", default="python3.11", help="interpreter of the environments (%(default)s)")
    parser.add_argument("--pip-args", default="", help="more arguments of pip install")
    options = parser.parse_args()
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="check_nemo_") as scratch:
        folder = Path(scratch)
        made = make_checkpoints(folder)
        for family in [options.only] if options.only else READERS:
            interpreter = environment(options.cache.resolve(), family, options.python, options.pip_args.split())
            outcomes += read(interpreter, family, made[family], folder)
    print("\n" + table([outcome.row() for outcome in outcomes]))
    for reader in dict.fromkeys(outcome.reader for outcome in outcomes):
        stubs = dict.fromkeys(stub for outcome in outcomes if outcome.reader == reader for stub in outcome.stubs)
        print(f"\nReplaced for lack of a GPU, with {reader}:\n" + "\n".join(f"- {stub}" for stub in stubs))
    return 0 if all(outcome.ok for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
