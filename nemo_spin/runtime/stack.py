"""Where a thread is, as people look for it: the collective that it waits in, who called it, and where in here."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

_PACKAGE = Path(__file__).resolve().parents[1]
_COLLECTIVES = "torch/distributed/distributed_c10d.py"
_WRAPPER = "torch/distributed/c10d_logger.py"


def position(thread: threading.Thread) -> str:
    """Such as "waits in all_reduce at core/mappings.py:38 (_reduce), from nemo_spin/megatron/forward.py:73 (run)"."""
    frames = list(_inside_out(sys._current_frames().get(thread.ident)))
    if not frames:
        return "has ended"
    # Of the frames of torch the outermost is what was called: what it calls in turn says less.
    collectives = [i for i, frame in enumerate(frames) if frame.f_code.co_filename.endswith(_COLLECTIVES)]
    what = f"waits in {frames[collectives[-1]].f_code.co_name}" if collectives else "is"
    callers = frames[collectives[-1] + 1 :] if collectives else frames
    frames = [frame for frame in callers if not frame.f_code.co_filename.endswith(_WRAPPER)]
    ours = next((frame for frame in frames if _PACKAGE in Path(frame.f_code.co_filename).parents), frames[0])
    return f"{what} at {_line(frames[0])}" + (f", from {_line(ours)}" if ours is not frames[0] else "")


def _inside_out(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _line(frame: FrameType) -> str:
    path = Path(frame.f_code.co_filename)
    name = path.relative_to(_PACKAGE.parent) if _PACKAGE in path.parents else Path(*path.parts[-2:])
    return f"{name}:{frame.f_lineno} ({frame.f_code.co_name})"
