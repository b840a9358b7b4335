"""Named points of a run at which a test can end the process as a power cut would: at once, with nothing put right.

    NEMO_SPIN_KILL_AT="checkpoint/renamed"      every process that gets there is killed (SIGKILL)
    NEMO_SPIN_KILL_AT="train/step:5"            when it gets there for the fifth time
    NEMO_SPIN_KILL_RANK=2                       only that process
    NEMO_SPIN_KILL_ONCE=/path                   not once this file exists; it is made before the first kill

Names are `area/what has just happened`. Without the variable a point costs a look at the environment.
"""

from __future__ import annotations

import os
import signal
from collections import Counter

_times: Counter[str] = Counter()


def reached(point: str) -> None:
    """The run is at `point`, for as many times as this has been called with it."""
    wanted = os.environ.get("NEMO_SPIN_KILL_AT")
    if wanted is None:
        return
    _times[point] += 1
    name, _, times = wanted.partition(":")
    rank = os.environ.get("RANK", "0")
    if name == point and _times[point] == int(times or 1) and os.environ.get("NEMO_SPIN_KILL_RANK", rank) == rank:
        if once := os.environ.get("NEMO_SPIN_KILL_ONCE"):
            try:
                open(once, "x").close()
            except FileExistsError:
                return
        os.kill(os.getpid(), signal.SIGKILL)
