"""Training and decoding speed beside transformers, and the memory of a SPIN step beside an SFT step.

    python benchmarks/speed.py [--json] [--threads 2] [--rounds 7]

On the CPU, in one process, in fp32, with a Llama of about 8 million parameters that has the same weights on both sides.
The two sides of a line take turns, because other work on the machine slows both: a ratio is the median over the rounds
of one round's ratio, a figure the median over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""
warnings.filterwarnings("ignore")

import memory
import torch
import workload
from transformers import LlamaForCausalLM

from nemo_spin.generation.engine import GenerationRequest
from nemo_spin.megatron import setup, steps
from nemo_spin.pairs import Example, Pair

REQUESTS = 32
# Most answers are short, a few are long.
SKEWED = (96, 12, 24, 16, 32, 8, 20, 48)
MIB = 2**20


@dataclass(frozen=True)
class Line:
    """One comparison. bar: what the ratio, measured / against, should be at least (rates) or at most (memory)."""

    what: str
    unit: str
    measured: float
    against: float
    ratio: float
    bar: float | None
    higher_is_better: bool = True

    @property
    def verdict(self) -> str:
        if self.bar is None:
            return ""
        met = self.ratio >= self.bar if self.higher_is_better else self.ratio <= self.bar
        return f"{'>=' if self.higher_is_better else '<='} {self.bar:g} {'met' if met else 'MISSED'}"


def rates(tokens: int, ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> dict[str, float]:
    """Tokens per second of both, called in turns after one call each to warm up."""

    def seconds(function: Callable[[], object]) -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    ours(), theirs()
    pairs = []
    for i in range(rounds):
        if i % 2:
            pairs.append((seconds(ours), seconds(theirs)))
        else:
            pairs.append((seconds(ours), seconds(theirs))[::1])
    return {
        "measured": statistics.median(tokens / a for a, _ in pairs),
        "against": statistics.median(tokens / b for _, b in pairs),
        "ratio": statistics.median(b / a for a, b in pairs),
    }
