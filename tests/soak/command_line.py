"""The soak through the real command: `nemo-spin train` starts the processes, and finds out that one of them was killed.

    python tests/soak/command_line.py --kills 5 --seed 0

A start takes most of a minute, so it is fewer kills. Prints a table in Markdown, and exits with 1 if a life came to
another end than the run in peace.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "distributed"))

import psutil
import torch
from killable import TP2_PP2, KillableRun, make_inputs
from torch import Tensor

from nemo_spin.model_io.open import open_checkpoint
from nemo_spin.reporting.page.history import read_history

REPO = Path(__file__).resolve().parents[2]
_PATIENCE = 900.0
_COLUMNS = ("kill", "life", "killed", "after, s", "all ended within, s", "exit code", "went on from", "last words")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the victims")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nemo_spin_soak_") as directory:
        found = soak(Path(directory), arguments.kills, random.Random(arguments.seed))
    print("\n" + ("; ".join(found) or "Every life has ended like the run in peace, bit by bit."))
    return 1 if found else 0


def soak(directory: Path, kills: int, chance: random.Random) -> list[str]:
    """Sentences on how a run that was killed differs from the one that was not."""
    make_inputs(directory)
    peaceful = KillableRun(directory / "in-peace", directory)
    began = time.monotonic()
    process, output = _start(peaceful)
    if process.wait(_PATIENCE):
        return [f"the run in peace failed: {output.read_text()[-2000:]}"]
    duration = time.monotonic() - began
    print(_row(*_COLUMNS) + "\n" + _row(*["---"] * len(_COLUMNS)), flush=True)
    found: list[str] = []
    done = life = 0
    while done < kills and not found:
        life += 1
        run = KillableRun(directory / f"life-{life}", directory)
        while True:
            began = time.monotonic()
            process, output = _start(run)
            with suppress(subprocess.TimeoutExpired):
                process.wait(chance.uniform(0.3, 0.9) * duration if done < kills else _PATIENCE)
            if process.poll() is not None:
                break
            victim, struck = _kill(process, chance), time.monotonic()
            code = process.wait(_PATIENCE)
            lived, died = struck - began, time.monotonic() - struck
            done += 1
            print(
                _row(done, life, victim, f"{lived:.0f}", f"{died:.1f}", code, *_words(output.read_text())), flush=True
            )
        if process.returncode:
            return [f"life {life} failed: {output.read_text()[-2000:]}"]
        found = _differences(run, peaceful)
    return found


def _start(run: KillableRun) -> tuple[subprocess.Popen, Path]:
    output = run.directory / f"start-{run.starts:03d}.log"
    run.starts += 1
    arguments = [f"{key}={_plain(value)}" for key, value in run.values(TP2_PP2).items()]
    environment = os.environ | {"PYTHONPATH": str(REPO), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with open(output, "w") as file:
        command = [sys.executable, "-m", "nemo_spin", "train", *arguments]
        return subprocess.Popen(
            command, cwd=run.directory, env=environment, stdout=file, stderr=file, start_new_session=True
        ), output


def _kill(launcher: subprocess.Popen, chance: random.Random) -> str:
    """Kill one of the run's processes, or all and what has started them. Returns who it was."""
    ranks = {}
    for process in psutil.Process(launcher.pid).children(recursive=True):
        with suppress(psutil.Error):
            if (rank := process.environ().get("RANK")) is not None:
                ranks[rank] = process
    if ranks and chance.random() < 0.7:
        rank = chance.choice(sorted(ranks))
        ranks[rank].kill()
        return f"rank {rank}"
    everything = [*psutil.Process(launcher.pid).children(recursive=True), psutil.Process(launcher.pid)]
    for process in everything:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
    return "all" if ranks else "the launcher, alone"


def _words(output: str) -> tuple[str, str]:
    resumed = re.search(r"Resumed from \S*?([^/\s]+)\s", output)
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    return resumed[1] if resumed else "", errors[-1] if errors else ""


def _differences(killed: KillableRun, peaceful: KillableRun) -> list[str]:
    ours, theirs = _exported(killed), _exported(peaceful)
    found = [f"exported weights: {name}" for name in theirs if not torch.equal(ours[name], theirs[name])]
    losses = [read_history(run.run_dir / "metrics.jsonl").series("loss").values for run in (killed, peaceful)]
    if losses[0] != losses[1]:
        found.append(f"losses: {losses[0]} and {losses[1]}")
    return found


def _exported(run: KillableRun) -> dict[str, Tensor]:
    with open_checkpoint(run.run_dir / "checkpoints" / "megatron_gpt_spin.nemo") as source:
        store = source.weights()
        return {name: store.read(name) for name in store.tensors}


def _plain(value: Any) -> str:
    return str(value).replace(" ", "") if isinstance(value, list) else str(value)


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    sys.exit(main())
