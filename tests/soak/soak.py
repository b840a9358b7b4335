"""Kills a training run at random moments, starts it again each time, and compares its end with that of a run in peace.

    python tests/soak/soak.py --kills 50 --seed 0

A life is a run from nothing to its end, with as many kills as fall into it; lives follow each other until the kills are
used up. Prints two tables in Markdown, and exits with 1 if a life came to another end; its files then stay.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "distributed"))

from killable import End, KillableRun, make_inputs
from moments import Moment, draw, phase_lengths
from run_endings import differences
from run_notes import History, history_of, read_notes

_KILLS = ("kill", "life", "killed", "while", "others gone by themselves within 2 s", "went on from step",
          "steps made again", "responses asked again")  # fmt: skip
_LIVES = ("life", "starts", "kills", "end", "left in TMPDIR")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the victims")
    arguments = parser.parse_args()
    began = time.monotonic()
    directory = Path(tempfile.mkdtemp(prefix="nemo_spin_soak_"))
    is_well = soak(directory, arguments.kills, random.Random(arguments.seed))
    minutes = (time.monotonic() - began) / 60
    if is_well:
        shutil.rmtree(directory)
        print(f"\n{arguments.kills} kills in {minutes:.0f} minutes; every life ended like the run in peace.")
    else:
        print(f"\nNOT every life ended like the run in peace; their files are in {directory}.")
    return 0 if is_well else 1


def soak(directory: Path, kills: int, chance: random.Random) -> bool:
    """Whether all lives have come to the same end."""
    make_inputs(directory)
    peaceful = KillableRun(directory / "in-peace", directory)
    expected = peaceful.finish()
    lengths = phase_lengths(read_notes(peaceful.directory))
    print(_heading(_KILLS), flush=True)
    done, lives, is_well = 0, [], True
    while done < kills:
        run = KillableRun(directory / f"life-{len(lives) + 1}", directory)
        killed, end = _live(run, kills - done, lengths, chance)
        history = history_of(read_notes(run.directory))
        for start, (moment, killed_end) in enumerate(killed):
            done += 1
            print(_row(done, len(lives) + 1, *_of_kill(moment, killed_end, history, start + 1)), flush=True)
        if end.is_whole:
            found = differences(run, run.outcome(), peaceful, expected)
        else:
            found = [f"start {run.starts} failed with the exit codes {end.codes}"]
        left = len([path for path in run.scratch.glob("*") if "wandb" not in path.name])
        lives.append(_row(len(lives) + 1, run.starts, len(killed), "; ".join(found) or "the same, bit by bit", left))
        if not found:
            shutil.rmtree(run.directory)
        is_well = is_well and not found
    print("\n" + _heading(_LIVES), *lives, sep="\n")
    return is_well


def _live(
    run: KillableRun, kills: int, lengths: dict[str, float], chance: random.Random
) -> tuple[list[tuple[Moment, End]], End]:
    """Start the run until it ends by itself: those that were killed, and the end of the last."""
    killed = []
    while True:
        moment = draw(chance, run, lengths) if len(killed) < kills else None
        end = run.start(meddle=moment.strike if moment else None)
        if moment is None or not moment.doing or end.is_whole:
            return killed, end
        killed.append((moment, end))


def _of_kill(moment: Moment, end: End, history: History, next_start: int) -> Iterable[object]:
    victims, others = moment.victims, len(end.codes) - len(moment.victims)
    yield "all" if not others else f"rank {victims[0]}"
    yield moment.doing
    yield f"{len(end.by_themselves - set(victims))} of {others}" if others else ""
    yield history.resumed.get(next_start, "killed before that")
    yield history.repeated(next_start)
    yield history.again[next_start]


def _heading(columns: tuple[str, ...]) -> str:
    return _row(*columns) + "\n" + _row(*["---"] * len(columns))


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    sys.exit(main())
