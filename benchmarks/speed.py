"""Training speed beside transformers, and the memory of a SPIN step beside that of an SFT step.

    python benchmarks/speed.py [--json] [--threads 2] [--rounds 5]

On the CPU, in one process, in fp32, with a Llama of 8 million parameters that has the same weights on both sides.
The two sides of a line take turns, because other work on the machine slows both: a ratio is the median over the rounds
of the ratio within a round, a figure the median over the rounds. The bars are for a machine with nothing else to do:
its load is printed. On a busy one the ratio of the processor times of all threads, `cpu`, is the one to look at.
Generation, and SPIN beside TRL, are measured by peers/compare.py.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import memory
import torch
import workload
from transformers import LlamaForCausalLM

import nemo_spin.cli.silence_libraries  # noqa: F401
from nemo_spin.data.example import Example
from nemo_spin.megatron import setup, steps
from nemo_spin.megatron.optimizer import Optimizer
from nemo_spin.selfplay.pairs import Pair, group_of_example
from nemo_spin.selfplay.step import spin_step

MIB = 2**20
WIDTH = 64


@dataclass(frozen=True)
class Line:
    """A comparison.

    bar: what the ratio should be, at least where more is better (rates), else at most (memory).
    cpu_ratio: the ratio by processor time in place of time on the clock; None for memory.
    """

    what: str
    unit: str
    measured: float
    against: float
    ratio: float
    cpu_ratio: float | None
    bar: float | None
    more_is_better: bool

    def __str__(self) -> str:
        verdict = ""
        if self.bar is not None:
            met = self.ratio >= self.bar if self.more_is_better else self.ratio <= self.bar
            verdict = f"{'>=' if self.more_is_better else '<='} {self.bar:g} {'met' if met else 'MISSED'}"
        cpu = "" if self.cpu_ratio is None else f"{self.cpu_ratio:.2f}"
        figures = f"{self.measured:>10,.1f} {self.against:>10,.1f} {self.ratio:>6.2f} {cpu:>6}"
        return f"{self.what:<{WIDTH}} {self.unit:<8} {figures}  {verdict}"


def rates(
    what: str, tokens: int, ours: Callable[[], object], other: Callable[[], object], rounds: int, bar: float | None
) -> Line:
    """Tokens per second of two functions that process as many tokens, after a call of each to warm up."""

    def seconds(function: Callable[[], object]) -> tuple[float, float]:
        clock, processor = time.perf_counter(), time.process_time()
        function()
        return time.perf_counter() - clock, time.process_time() - processor

    ours(), other()
    taken = [(seconds(ours), seconds(other)) for _ in range(rounds)]
    return Line(
        what,
        "tokens/s",
        measured=statistics.median(tokens / first for (first, _), _ in taken),
        against=statistics.median(tokens / second for _, (second, _) in taken),
        ratio=statistics.median(second / first for (first, _), (second, _) in taken),
        cpu_ratio=statistics.median(second / first for (_, first), (_, second) in taken),
        bar=bar,
        more_is_better=True,
    )


class TransformersTraining:
    """The usual loop around a model of transformers: forward, backward, clipping and AdamW in its fused variant."""

    def __init__(self, model: LlamaForCausalLM, examples: list[Example]) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=workload.LEARNING_RATE,
            betas=workload.BETAS,
            eps=workload.EPS,
            weight_decay=workload.WEIGHT_DECAY,
            fused=True,
        )
        self.tokens = torch.tensor([example.prompt_ids + example.response_ids for example in examples])
        self.labels = self.tokens.clone()
        self.labels[:, : workload.PROMPT_TOKENS] = -100

    def step(self) -> float:
        self.model.train()
        self.optimizer.zero_grad()
        loss = self.model(self.tokens, labels=self.labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), workload.CLIP)
        self.optimizer.step()
        return loss.item()


def training(optimizer: Optimizer, llama: LlamaForCausalLM, rounds: int) -> Line:
    examples = workload.examples(workload.SEQUENCES)
    theirs = TransformersTraining(llama, examples)

    def ours() -> float:
        return steps.sft_step(
            optimizer, [group_of_example(e) for e in examples], workload.batching(workload.SEQUENCES)
        )["loss"]

    first, second = ours(), theirs.step()
    if abs(first - second) > 1e-4 * second:
        raise SystemExit(f"The two models are not the same: their first losses are {first} and {second}.")
    return rates("SFT step, against transformers", theirs.tokens.numel(), ours, theirs.step, rounds, bar=0.9)


def self_play(optimizer: Optimizer, rounds: int) -> Line:
    """Pairs with responses of different lengths, against the same sequences as examples of one SFT micro-batch."""
    pairs = [
        Pair(example, workload.random_ids(workload.RESPONSE_TOKENS - 16 * i, 1000 + i), "length", -500.0, -500.0)
        for i, example in enumerate(workload.examples(workload.SEQUENCES // 2))
    ]
    examples = workload.as_sft(pairs)
    tokens = sum(len(example.prompt_ids) + len(example.response_ids) for example in examples)

    def spin() -> object:
        return spin_step(optimizer, pairs, 0.1, workload.batching(len(pairs)))

    def sft() -> object:
        return steps.sft_step(optimizer, [group_of_example(e) for e in examples], workload.batching(len(examples)))

    return rates("SPIN step, against our SFT step on the same tokens", tokens, spin, sft, rounds, bar=None)


def step_memory(threads: int) -> Iterator[Line]:
    spin, sft = (memory.in_new_process(step, threads) for step in ("spin", "sft"))

    def line(what: str, measured: int, against: int, bar: float | None) -> Line:
        what = f"{what}, against our SFT step"
        return Line(what, "MiB", measured / MIB, against / MIB, measured / against, None, bar, more_is_better=False)

    yield line("peak of a SPIN step, resident", spin["rss"], sft["rss"], 1.1)
    yield line("peak of a SPIN step, allocated", spin["allocated"], sft["allocated"], 1.1)
    yield line("peak of an iteration's rollouts, resident", spin["rollouts_rss"], sft["rss"], None)


def lines(threads: int, rounds: int) -> Iterator[Line]:
    # First, while this process is small and idle.
    yield from step_memory(threads)
    torch.manual_seed(0)
    setup.initialize(1, 1, seed=1)
    gpt, optimizer = workload.policy(steps=1000)
    llama = workload.in_transformers(workload.architecture(), gpt)
    yield training(optimizer, llama, rounds)
    yield self_play(optimizer, rounds)
    setup.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    packages = {name: version(name) for name in ("torch", "megatron-core", "transformers")}
    software = {"python": platform.python_version()} | packages
    load = os.getloadavg()[0]
    if not arguments.json:
        print(", ".join(f"{name} {number}" for name, number in software.items()))
        print(f"{arguments.threads} threads, {arguments.rounds} rounds, load average {load:.1f} before the start\n")
        print(f"{'':<{WIDTH}} {'':<8} {'measured':>10} {'against':>10} {'ratio':>6} {'cpu':>6}  bar", flush=True)
    found = []
    for line in lines(arguments.threads, arguments.rounds):
        found.append(line)
        if not arguments.json:
            print(line, flush=True)
    if arguments.json:
        print(json.dumps({"software": software, **vars(arguments), "load": load, "lines": [asdict(x) for x in found]}))


if __name__ == "__main__":
    main()
