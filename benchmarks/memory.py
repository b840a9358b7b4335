"""The memory of one training step, measured in a process of its own: `python benchmarks/memory.py sft|spin`.

Prints a JSON object, in bytes above what the process held when model and optimizer existed: `rss` is the peak of the
step as the kernel counts it, after the rollouts of the whole iteration for SPIN; `rollouts_rss` the peak of these.
`allocated` is the peak of what the step itself takes from torch's allocator: less than `rss`, but free of noise.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
ITERATION = 32
"""Pairs of an iteration: eight SPIN steps."""


def in_new_process(step: str, threads: int) -> dict[str, int]:
    """Measure the "sft" or the "spin" step."""
    # With fixed thresholds glibc gives freed tensors back at once: what is resident is what is used.
    allocator = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, step, "--threads", str(threads)]
    done = subprocess.run(command, env=os.environ | allocator, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"The {step} step failed:\n{done.stderr}")
    return json.loads(done.stdout)


def resident(field: str) -> int:
    """VmRSS, what is resident now, or VmHWM, the most that was since `forget_peak`."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    gc.collect()
    CLEAR_REFS.write_text("5")


def peak_allocated(step: Callable[[], object]) -> int:
    """The most that `step` holds at a time of what torch's CPU allocator hands out."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def measure(step: str, threads: int) -> dict[str, int]:
    import nemo_spin.cli.silence_libraries  # noqa: F401, I001

    import torch
    import workload

    from nemo_spin.megatron import setup, steps
    from nemo_spin.selfplay.pairs import group_of_example
    from nemo_spin.selfplay.reference import Reference
    from nemo_spin.selfplay.rollouts.roll_out import RolloutRequest, roll_out
    from nemo_spin.selfplay.step import spin_step

    torch.set_num_threads(threads)
    setup.initialize(1, 1, seed=1)
    gpt, optimizer = workload.policy(steps=10)
    # Adam's moments exist after the first step.
    steps.sft_step(optimizer, [group_of_example(e) for e in workload.examples(1)], workload.batching(1))
    forget_peak()
    before = resident("VmRSS")

    data = workload.examples(ITERATION)
    reference = Reference(gpt, keep_copy=False)
    figures = {}
    pairs_per_step = workload.SEQUENCES // 2
    if step == "spin":
        generator = workload.generator(gpt, slots=workload.SEQUENCES)
        with reference.swapped_in():
            scoring = workload.batching(workload.SEQUENCES)
            request = RolloutRequest(data, iteration=0)
            rollouts = roll_out(gpt, generator, request, workload.RESPONSE_TOKENS, scoring).rollouts
        figures["rollouts_rss"] = resident("VmHWM") - before
        pairs = workload.as_pairs(data, rollouts)[:pairs_per_step]

        def run() -> object:
            return spin_step(optimizer, pairs, 0.1, workload.batching(pairs_per_step))
    else:

        def run() -> object:
            return steps.sft_step(
                optimizer,
                [group_of_example(e) for e in data[: workload.SEQUENCES]],
                workload.batching(workload.SEQUENCES),
            )

    forget_peak()
    run()
    figures["rss"] = resident("VmHWM") - before
    figures["allocated"] = peak_allocated(run)
    setup.shutdown()
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=("sft", "spin"))
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.step, arguments.threads)))
