"""Decoding with pipeline stages, one thread each, beside decoding without stages on the same cores.

    python benchmarks/pipeline_decode.py [--json] [--stages 2] [--rounds 5] [--slots 32] [--requests 192]

Without stages there are two ways to use the cores: one process with as many threads, and as many replicas, which share
nothing and wait for nobody. The three take turns in the same processes, because other work on the machine slows all.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["OMP_NUM_THREADS"] = "1"

import nemo_spin.cli.silence_libraries  # noqa: F401, I001

import torch
import torch.distributed as dist
import workload
from megatron.core import parallel_state

from nemo_spin.generation.interface import GenerationRequest
from nemo_spin.megatron import setup
from nemo_spin.megatron.gpt import build_gpt

# Most answers are short, a few are long.
SKEWED = (8, 16, 10, 64, 22, 6, 14, 32)
EQUAL = (64,)


def measure(
    stages: int = 2, rounds: int = 5, slots: int = 32, requests: int = 192, lengths: tuple[int, ...] = EQUAL
) -> dict[str, Any]:
    """Medians over the rounds. slots: rows of a pass. requests: for all processes together. lengths: of the responses,
    repeated.

    Returns one_process, replicas and pipeline (tokens per second of all processes), and the ratios of the last of them
    to the others: to_one_process, to_replicas.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory, context.Pool(stages) as pool:
        arguments = (stages, rounds, slots, requests, lengths, os.path.join(directory, "store"))
        seconds = pool.starmap(_process, [(rank, *arguments) for rank in range(stages)], chunksize=1)[0]
    tokens = sum(lengths[i % len(lengths)] for i in range(requests))
    return {
        "one_process": statistics.median(tokens / one for one, _, _ in seconds),
        "replicas": statistics.median(tokens / replicas for _, replicas, _ in seconds),
        "pipeline": statistics.median(tokens / pipeline for _, _, pipeline in seconds),
        "to_one_process": statistics.median(one / pipeline for one, _, pipeline in seconds),
        "to_replicas": statistics.median(replicas / pipeline for _, replicas, pipeline in seconds),
    }


def _process(
    rank: int, stages: int, rounds: int, slots: int, requests: int, lengths: tuple[int, ...], store: str
) -> list[tuple[float, float, float]]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=stages)
    work = [
        GenerationRequest(i, workload.random_ids(workload.PROMPT_TOKENS, i), lengths[i % len(lengths)])
        for i in range(requests)
    ]

    def of_each(work: list[GenerationRequest]) -> tuple[float, float, float]:
        return _seconds(1, slots, work, alone=True), _seconds(1, slots, work), _seconds(stages, slots, work)

    of_each(work[: 2 * stages])
    return [of_each(work) for _ in range(rounds)]


def _seconds(stages: int, slots: int, work: list[GenerationRequest], alone: bool = False) -> float:
    """Until the last process is done, with so many pipeline stages and as many replicas as there are processes left.

    alone: the first process does all of it, with a thread for each process.
    """
    setup.initialize(1, stages, seed=1)
    torch.manual_seed(0)
    generator = workload.generator(build_gpt(workload.architecture(), "32"), slots)
    replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    if alone:
        own = work if replica == 0 else []
        torch.set_num_threads(replicas)
    else:
        own = work[replica::replicas]
    dist.barrier()
    begin = time.perf_counter()
    generator.generate(own, iteration=0)
    dist.barrier()
    torch.set_num_threads(1)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--requests", type=int, default=192)
    arguments = parser.parse_args()
    options = {key: value for key, value in vars(arguments).items() if key != "json"}
    for name, lengths in (("equal", EQUAL), ("skewed", SKEWED)):
        found = measure(**options, lengths=lengths)
        if arguments.json:
            print(json.dumps({"lengths": name, **options, **found}), flush=True)
        else:
            print(
                f"{name} lengths: {found['pipeline']:,.0f} tokens/s in {arguments.stages} stages; "
                f"{found['one_process']:,.0f} in one process: {found['to_one_process']:.2f}; "
                f"{found['replicas']:,.0f} in replicas: {found['to_replicas']:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
