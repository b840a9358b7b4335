"""Generation by this package's engine and by megatron-core's dynamic engine, in turns, in one process.

    python benchmarks/engines.py

The model is that of `workload.py`. Both make the same responses, which is checked. On a CPU the kernels of
megatron-core's engine are stand-ins in plain torch (`nemo_spin/generation/megatron_engine_cpu.py`): its figures there
say what its bookkeeping and its padding cost, and nothing about a GPU.
"""

from __future__ import annotations

import argparse
import os
import time
from array import array
from statistics import median

import torch
import workload

from nemo_spin.config import SamplingParams
from nemo_spin.generation.choose import MEGATRON, OWN, make_engine
from nemo_spin.generation.interface import Engine, GenerationRequest
from nemo_spin.generation.rules import Rules
from nemo_spin.megatron import setup

# tokens of the responses, and of the prompts, each repeated over the requests
EQUAL, SKEWED = (48,), (96, 8, 16, 8, 48, 8, 8, 24)
PROMPTS = (24, 96, 48, 72, 36)
SAMPLING = SamplingParams(use_greedy=False, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, end_strings=())


def requests_of(count: int, pattern: tuple[int, ...]) -> list[GenerationRequest]:
    prompts = [workload.random_ids(PROMPTS[i % len(PROMPTS)], i) for i in range(count)]
    return [GenerationRequest(i, ids, pattern[i % len(pattern)]) for i, ids in enumerate(prompts)]


def seconds(engine: Engine, requests: list[GenerationRequest]) -> tuple[float, float, list[array[int]]]:
    """On the clock and of the processor, and the tokens."""
    clock, processor = time.perf_counter(), time.process_time()
    responses = engine.generate(requests, iteration=0)
    return time.perf_counter() - clock, time.process_time() - processor, [response.ids for response in responses]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--slots", type=int, nargs="+", default=[8, 32])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    setup.initialize(1, 1, seed=1)
    gpt, _ = workload.policy(steps=1)
    rules = Rules(SAMPLING, workload.VOCAB_SIZE, workload.CONTEXT, seed=1)
    print(f"{arguments.threads} threads, {arguments.rounds} rounds, load average {os.getloadavg()[0]:.1f}")
    print("ratio: of the time on the clock, cpu: of the processor's; above 1 this package's engine is faster\n")
    print(f"{'':<28}{OWN + ' tok/s':>18}{'useful':>8}{MEGATRON + ' tok/s':>18}{'useful':>8}{'ratio':>8}{'cpu':>7}")
    for slots in arguments.slots:
        for shape, pattern in (("equal", EQUAL), ("skewed", SKEWED)):
            requests = requests_of(arguments.requests, pattern)
            ours, megatrons = (make_engine(name, gpt, rules, slots) for name in (OWN, MEGATRON))
            if seconds(ours, requests)[2] != seconds(megatrons, requests)[2]:
                raise SystemExit("The two engines make different responses.")
            taken = [(seconds(ours, requests), seconds(megatrons, requests)) for _ in range(arguments.rounds)]
            line = f"{slots:>3} rows, {shape} lengths"
            tokens = sum(request.max_new_tokens for request in requests)
            cells = [f"{line:<28}"]
            for place, engine in enumerate((ours, megatrons)):
                rate = median(tokens / pair[place][0] for pair in taken)
                cells.append(f"{rate:>18,.0f}{engine.statistics.useful_share:>8.2f}")
            for kind, width in ((0, 8), (1, 7)):
                cells.append(f"{median(theirs[kind] / own[kind] for own, theirs in taken):>{width}.2f}")
            print("".join(cells), flush=True)
    setup.shutdown()


if __name__ == "__main__":
    main()
