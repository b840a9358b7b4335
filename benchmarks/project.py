"""What an iteration of SPIN should take on GPUs that are not here: computed, not measured.

    python benchmarks/project.py [--pairs 50000] [--prompt 300] [--chosen 300] [--rejected 250] [--longest 1024]

Seconds come from the cost model, memory from the forecast that `nemo-spin train` makes before it starts. All that is
assumed of the machine is printed. Nothing of it ran on a GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace

from cost_model import Iteration, IterationCost, Layout, Link, Machine, Shape, iteration
from llama import llama
from omegaconf import OmegaConf

import nemo_spin.cli.silence_libraries  # noqa: F401
from nemo_spin.commands.memory_estimate import MemoryEstimate, estimate
from nemo_spin.config import SpinConfig, config_dir, parse_config, register_resolvers

GIB = 2**30

# H100 SXM: 989e12 FLOP/s in bf16, 3.35e12 bytes/s, 80e9 bytes; NVLink 450e9 bytes/s one way; InfiniBand 50e9 per GPU.
FLOPS = 0.5 * 989e12
BANDWIDTH = 0.7 * 3.35e12
NVLINK = Link(bandwidth=0.75 * 450e9, latency=5e-6)
INFINIBAND = Link(bandwidth=0.8 * 50e9, latency=10e-6)
LAYER_SECONDS = 200e-6
MEMORY = 0.9 * 80e9
GPUS_OF_A_NODE = 8
PAIRS_PER_STEP, ROWS = 64, 128
MICRO_BATCH_TOKENS = (2048, 4096, 8192)


@dataclass(frozen=True)
class Model:
    name: str
    shape: Shape
    gpus: int


MODELS = (
    Model("7B, as Mistral", Shape(32, 4096, 32, 8, 128, 14336, 32000), 8),
    Model("70B, as Llama 3", Shape(80, 8192, 64, 8, 128, 28672, 128256), 64),
)


@dataclass(frozen=True)
class Projection:
    layout: Layout
    micro_batch_tokens: int
    recompute: bool
    memory: MemoryEstimate
    cost: IterationCost

    @property
    def bytes(self) -> int:
        return self.memory.needed + self.memory.activations


def layouts(model: Model) -> Iterator[Layout]:
    """Tensor parallelism stays within a node; pipeline stages have as many layers each."""
    for tp in (1, 2, 4, 8):
        for pp in (1, 2, 4, 8):
            if model.gpus % (tp * pp) == 0 and model.shape.layers % pp == 0:
                yield Layout(tp, pp, model.gpus // (tp * pp))


def machine(layout: Layout) -> Machine:
    """Groups that fit into a node talk over NVLink, the others over InfiniBand."""
    in_node = layout.processes <= GPUS_OF_A_NODE
    rest = NVLINK if in_node else INFINIBAND
    pipeline = NVLINK if layout.tp * layout.pp <= GPUS_OF_A_NODE else INFINIBAND
    return Machine(FLOPS, BANDWIDTH, LAYER_SECONDS, NVLINK, pipeline, rest, bytes_per_value=2)


def configuration(layout: Layout, micro_batch_tokens: int, recompute: bool, longest: int) -> SpinConfig:
    own = {
        "trainer": {"accelerator": "gpu", "precision": "bf16", "devices": layout.processes},
        "exp_manager": {"explicit_log_dir": "projection"},
        "pretrained_checkpoint": {"restore_from_path": "projection"},
        "model": {
            "tensor_model_parallel_size": layout.tp,
            "pipeline_model_parallel_size": layout.pp,
            "sequence_parallel": layout.tp > 1,
            "micro_batch_tokens": micro_batch_tokens,
            "global_batch_size": PAIRS_PER_STEP,
            "encoder_seq_length": longest,
            "activations_checkpoint_granularity": "full" if recompute else None,
            "spin": {"rollout_batch_size": ROWS, "length_params": {"max_length": longest // 2}},
            "data": {"train_ds": {"file_path": "projection"}, "validation_ds": {"file_path": None}},
        },
    }
    return parse_config(OmegaConf.merge(OmegaConf.load(config_dir() / "gpt_spin.yaml"), own))


def projections(model: Model, work: Iteration, longest: int) -> list[Projection]:
    """Each layout that fits, with the micro-batches that are fastest in it, the fastest first. Activations are computed
    again only where that is needed to fit."""
    best = []
    for layout in layouts(model):
        found = [_project(model, layout, tokens, work, longest) for tokens in MICRO_BATCH_TOKENS]
        if fitting := [projection for projection in found if projection is not None]:
            best.append(min(fitting, key=lambda projection: projection.cost.seconds))
    return sorted(best, key=lambda projection: projection.cost.seconds)


def _project(model: Model, layout: Layout, micro_batch_tokens: int, work: Iteration, longest: int) -> Projection | None:
    own = replace(work, rows=ROWS * layout.pp, micro_batch_tokens=micro_batch_tokens)
    for recompute in (False, True):
        cfg = configuration(layout, micro_batch_tokens, recompute, longest)
        memory = estimate(llama(model.shape, 8192), cfg, longest, longest, work.pairs)
        # TransformerEngine's attention computes a pair's prompt twice.
        cost = iteration(model.shape, layout, machine(layout), own, recompute, shared_prompt=False)
        projection = Projection(layout, micro_batch_tokens, recompute, memory, cost)
        if projection.bytes <= MEMORY:
            return projection
    return None


def table(found: list[Projection]) -> str:
    lines = [
        "| layout | micro-batch | recompute | responses, min | reference, min | steps, min | sum, h | GiB per GPU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in found:
        cost, memory = one.cost, one.memory
        minutes = [(cost.prefill.seconds + cost.decode.seconds) / 60]
        minutes += [cost.scoring.seconds / 60, cost.training.seconds / 60]
        cells = [
            str(one.layout),
            str(one.micro_batch_tokens),
            "full" if one.recompute else "none",
            *(f"{value:.1f}" for value in minutes),
        ]
        cells += [f"{cost.seconds / 3600:.2f}", f"{one.bytes / GIB:.0f} (weights {memory.weights / GIB:.0f}, "
                  f"gradients {memory.gradients / GIB:.0f}, optimizer {memory.optimizer / GIB:.0f}, "
                  f"cache {memory.kv_cache / GIB:.0f}, activations {memory.activations / GIB:.0f})"]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def assumptions(options: argparse.Namespace) -> str:
    fewest, most = MICRO_BATCH_TOKENS[0], MICRO_BATCH_TOKENS[-1]
    nvlink, infiniband = (f"{link.bandwidth / 1e9:.0f} GB/s" for link in (NVLINK, INFINIBAND))
    lines = [
        f"H100 SXM 80 GB, {GPUS_OF_A_NODE} in a node: products at {FLOPS / 1e12:.0f} TFLOP/s in bf16 (50% of 989),",
        f"  memory at {BANDWIDTH / 1e12:.2f} TB/s (70% of 3.35), {MEMORY / GIB:.0f} GiB of it to use (90%)",
        f"{nvlink} over NVLink (75% of 450), {infiniband} over InfiniBand (80% of 50), for each GPU one way;",
        f"  {NVLINK.latency * 1e6:.0f} and {INFINIBAND.latency * 1e6:.0f} microseconds a message; none of it hidden",
        f"{LAYER_SECONDS * 1e6:.0f} microseconds to start a layer's kernels: no CUDA graphs",
        f"{options.pairs:,} pairs, {PAIRS_PER_STEP} in a step, one epoch",
        f"{options.prompt:g} tokens of prompt, {options.chosen:g} of human and {options.rejected:g} of generated",
        f"  response on average; memory for sequences of {options.longest} tokens",
        f"{ROWS} rows generated at a time by each pipeline stage of a replica, every slot of use",
        f"micro-batches of {fewest} to {most} tokens, the fastest that fit, without padding; prompts computed twice,",
        "  as with TransformerEngine",
        "bf16, fp32 gradients, the optimizer's state sharded over the replicas",
    ]
    return "\n".join(line if line.startswith(" ") else f"- {line}" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="What an iteration of SPIN should take on GPUs: computed, not measured."
    )
    add = parser.add_argument
    add("--pairs", type=int, default=50_000, help="of an iteration of one epoch (default 50000)")
    add("--prompt", type=float, default=300, help="mean tokens of a prompt (default 300)")
    add("--chosen", type=float, default=300, help="mean tokens of a human response (default 300)")
    add("--rejected", type=float, default=250, help="mean tokens of a generated response (default 250)")
    add("--longest", type=int, default=1024, help="tokens of the longest sequence, for memory (default 1024)")
    add("--most", type=int, default=4, help="layouts shown of each model, the fastest first (default 4)")
    options = parser.parse_args()
    register_resolvers()
    work = Iteration(
        options.pairs,
        PAIRS_PER_STEP,
        options.prompt,
        options.chosen,
        options.rejected,
        ROWS,
        MICRO_BATCH_TOKENS[0],
    )
    print("**Computed, not measured**: nothing of this ran on a GPU. Assumed:\n")
    print(assumptions(options))
    for model in MODELS:
        found = projections(model, work, options.longest)
        print(f"\n{model.name} ({model.shape.parameters / 1e9:.1f}B parameters) on {model.gpus} GPUs\n")
        print(table(found[: options.most]) if found else "No layout fits.")


if __name__ == "__main__":
    main()
