"""The most memory that a call takes, by the kernel's count. Standard library only."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from memory import forget_peak, resident


def above_idle(call: Callable[[], object]) -> int:
    """Bytes that were resident at most during the call, above what is resident now."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    idle = resident("VmRSS")
    forget_peak()
    call()
    return resident("VmHWM") - idle
