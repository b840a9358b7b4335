"""What a training step, a decode step and an iteration of SPIN should cost, by counting. Standard library only.

A stage of the pipeline takes the longer of computing (FLOPs at the rate of matrix products) and of reading its weights
(bytes at the bandwidth of the memory), and what is not hidden behind them: the collectives of tensor parallelism and a
fixed time per layer for starting its kernels. Micro-batches fill and drain the pipeline; data-parallel replicas add up
their gradients; the optimizer reads and writes its state. Nothing overlaps but what is said to: real runs are faster
where communication hides behind computing, and slower where kernels are small.

FLOPs count a multiplication and an addition as two. Bytes are bytes, times seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace


@dataclass(frozen=True)
class Shape:
    """A GPT with grouped-query attention. ffn_matrices: 3 with a gate, else 2."""

    layers: int
    hidden: int
    heads: int
    groups: int
    head_dim: int
    ffn: int
    vocab: int
    ffn_matrices: int = 3
    tied: bool = False

    @property
    def layer_weights(self) -> int:
        """Of the matrices; norms and biases are left out."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.groups)
        return attention + self.ffn_matrices * self.hidden * self.ffn

    @property
    def parameters(self) -> int:
        return self.layers * self.layer_weights + (1 if self.tied else 2) * self.vocab * self.hidden

    def layer_flops(self, tokens: float, context: float) -> float:
        """Forward. context: keys that a query meets, on average: half of the length where attention is causal."""
        return 2 * tokens * self.layer_weights + 4 * tokens * context * self.heads * self.head_dim

    def output_flops(self, tokens: float) -> float:
        """Forward, of the logits of so many tokens."""
        return 2 * tokens * self.hidden * self.vocab

    def kv_bytes(self, bytes_per_value: int) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.layers * self.groups * self.head_dim * bytes_per_value


@dataclass(frozen=True)
class Link:
    """Between two processes. bandwidth: bytes per second, one way. latency: seconds of the smallest message."""

    bandwidth: float
    latency: float

    def send(self, size: float) -> float:
        return self.latency + size / self.bandwidth

    def all_reduce(self, size: float, processes: int) -> float:
        """By a ring: every process sends its share 2 (n - 1) times."""
        if processes == 1:
            return 0.0
        steps = 2 * (processes - 1)
        return steps * self.send(size / processes)


@dataclass(frozen=True)
class Machine:
    """What one process can do while the others do the same.

    flops: per second, of matrix products as large as a micro-batch. bandwidth: bytes per second from its memory.
    layer_seconds: for starting a layer's kernels, forward, whatever its size.
    tensor, pipeline, data: the links between the processes of these groups.
    """

    flops: float
    bandwidth: float
    layer_seconds: float
    tensor: Link
    pipeline: Link
    data: Link
    bytes_per_value: int

    def shared(self, share: float) -> Machine:
        """With a share of the processor."""
        return replace(
            self,
            flops=self.flops * share,
            bandwidth=self.bandwidth * share,
            layer_seconds=self.layer_seconds / share,
        )


@dataclass(frozen=True)
class Layout:
    """tp x pp x dp processes."""

    tp: int = 1
    pp: int = 1
    dp: int = 1

    @property
    def processes(self) -> int:
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        sizes = {"TP": self.tp, "PP": self.pp, "DP": self.dp}
        return " x ".join(f"{name}{size}" for name, size in sizes.items() if size > 1) or "1 process"


@dataclass(frozen=True)
class Cost:
    """Seconds, by what takes them."""

    compute: float = 0.0
    tensor: float = 0.0
    pipeline: float = 0.0
    bubble: float = 0.0
    data: float = 0.0
    optimizer: float = 0.0

    @property
    def seconds(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def times(self, factor: float) -> Cost:
        return Cost(*(factor * getattr(self, field.name) for field in fields(self)))


@dataclass(frozen=True)
class Batch:
    """What a data-parallel replica trains on in a step: micro-batches of as many tokens.

    tokens: of a micro-batch. context: see `Shape.layer_flops`. scored: tokens of it that get logits.
    """

    micro_batches: int
    tokens: float
    context: float
    scored: float


def bubble_fraction(stages: int, micro_batches: int) -> float:
    """Share of the time in which a stage waits, when all stages take as long."""
    return (stages - 1) / (micro_batches + stages - 1)


def micro_batch(shape: Shape, layout: Layout, machine: Machine, batch: Batch, passes: int) -> tuple[Cost, float]:
    """One micro-batch in the slowest stage, which is the last one with its logits; and the seconds of another stage.

    passes: 1 forward, 3 forward and backward; one more where activations are computed again.
    """
    layers = shape.layers / layout.pp
    layer = shape.layer_flops(batch.tokens, batch.context) / (layout.tp * machine.flops) + machine.layer_seconds
    output = shape.output_flops(batch.scored) / (layout.tp * machine.flops)
    size = batch.tokens * shape.hidden * machine.bytes_per_value
    # Two in a layer's forward pass, as many in its backward pass and where it is computed again.
    collectives = 2 * layers * max(1, passes - 1) * machine.tensor.all_reduce(size, layout.tp)
    handed_on = machine.pipeline.send(size) * (1 if passes == 1 else 2) if layout.pp > 1 else 0.0
    other = passes * layers * layer + collectives + handed_on
    return Cost(compute=passes * (layers * layer + output), tensor=collectives, pipeline=handed_on), other


def run_batch(shape: Shape, layout: Layout, machine: Machine, batch: Batch, passes: int) -> Cost:
    """All micro-batches through the pipeline."""
    slowest, other = micro_batch(shape, layout, machine, batch, passes)
    # While it fills and drains, the slowest stage waits for the others.
    return slowest.times(batch.micro_batches) + Cost(bubble=(layout.pp - 1) * other)


def training_step(
    shape: Shape, layout: Layout, machine: Machine, batch: Batch, recompute: bool = False, sharded: bool = False
) -> Cost:
    """sharded: the optimizer's state is divided over the replicas."""
    per_process = shape.parameters / (layout.tp * layout.pp)
    # Gradient, main parameter and two moments are read, all but the gradient written, in fp32.
    optimizer = 7 * 4 * per_process / machine.bandwidth / (layout.dp if sharded else 1)
    data = machine.data.all_reduce(4 * per_process, layout.dp)
    return run_batch(shape, layout, machine, batch, 4 if recompute else 3) + Cost(data=data, optimizer=optimizer)


def decode_step(shape: Shape, layout: Layout, machine: Machine, rows: int, length: float) -> Cost:
    """One token for each row of a replica. length: of the rows so far, on average.

    As many groups of rows as stages are in flight, so that every stage always has one to work on.
    """
    group = rows / layout.pp
    layers = shape.layers / layout.pp

    def product(weights: float, flops: float) -> float:
        reading = weights * machine.bytes_per_value / (layout.tp * machine.bandwidth)
        return max(reading, flops / (layout.tp * machine.flops))

    cached = shape.kv_bytes(machine.bytes_per_value) / shape.layers * length * group
    layer = product(shape.layer_weights, 2 * group * shape.layer_weights) + machine.layer_seconds
    layer += max(
        cached / (layout.tp * machine.bandwidth),
        4 * group * length * shape.heads * shape.head_dim / (layout.tp * machine.flops),
    )
    size = group * shape.hidden * machine.bytes_per_value
    output = product(shape.vocab * shape.hidden, shape.output_flops(group))
    return Cost(
        compute=layout.pp * (layers * layer + output),
        tensor=layout.pp * 2 * layers * machine.tensor.all_reduce(size, layout.tp),
        pipeline=layout.pp * machine.pipeline.send(size) if layout.pp > 1 else 0.0,
    )


@dataclass(frozen=True)
class Iteration:
    """A round of self-play. prompt, chosen, rejected: mean tokens. pairs: of the iteration, and of a step.

    rows: that a replica generates at a time. micro_batch_tokens: of a micro-batch, at most.
    """

    pairs: int
    pairs_per_step: int
    prompt: float
    chosen: float
    rejected: float
    rows: int
    micro_batch_tokens: int

    def batch(self, layout: Layout, pairs: float, shared_prompt: bool) -> Batch:
        """What a replica gets of so many pairs."""
        prompts = self.prompt if shared_prompt else 2 * self.prompt
        tokens = pairs / layout.dp * (prompts + self.chosen + self.rejected)
        count = max(1, math.ceil(tokens / self.micro_batch_tokens))
        context = (self.prompt + (self.chosen + self.rejected) / 2) / 2
        scored = pairs / layout.dp * (self.chosen + self.rejected) / count
        return Batch(count, tokens / count, context, scored)


@dataclass(frozen=True)
class IterationCost:
    """Seconds of an iteration by phase."""

    prefill: Cost
    decode: Cost
    scoring: Cost
    training: Cost

    @property
    def seconds(self) -> float:
        return sum(getattr(self, field.name).seconds for field in fields(self))


def iteration(
    shape: Shape,
    layout: Layout,
    machine: Machine,
    work: Iteration,
    recompute: bool = False,
    shared_prompt: bool = True,
) -> IterationCost:
    """Responses, reference log-probabilities and one epoch of steps; the optimizer's state is divided over replicas."""
    own = work.pairs / layout.dp
    prefilled = own * work.prompt
    count = max(1, math.ceil(prefilled / work.micro_batch_tokens))
    prompts = Batch(count, prefilled / count, work.prompt / 2, own / count)
    rows = min(work.rows, math.ceil(own))
    decode = decode_step(shape, layout, machine, rows, work.prompt + work.rejected / 2)
    steps = math.ceil(work.pairs / work.pairs_per_step)
    batch = work.batch(layout, work.pairs_per_step, shared_prompt)
    return IterationCost(
        prefill=run_batch(shape, layout, machine, prompts, 1),
        decode=decode.times(own * work.rejected / rows),
        scoring=run_batch(shape, layout, machine, work.batch(layout, work.pairs, shared_prompt), 1),
        training=training_step(shape, layout, machine, batch, recompute, sharded=True).times(steps),
    )
