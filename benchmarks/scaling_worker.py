"""One process of a layout that scaling.py measures; the first one writes what was found.

scaling_worker.py FILE, which holds {"size": ..., "tp": ..., "pp": ..., "layer_seconds": [...], "result": FILE}
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

# isort: split
import nemo_spin.cli.silence_libraries  # noqa: F401
from nemo_spin.selfplay.step import spin_step

# isort: split
import machine
import torch
import workload
from cost_model import Batch, Layout, Shape, decode_step, training_step
from llama import llama
from megatron.core import parallel_state

from nemo_spin.config import OptimConfig, SchedConfig
from nemo_spin.generation.interface import GenerationRequest
from nemo_spin.megatron import setup
from nemo_spin.megatron.gpt import DTYPES, build_gpt
from nemo_spin.megatron.optimizer import Optimizer
from nemo_spin.selfplay.pairs import Pair

# name -> layers, hidden, heads, query groups, ffn. "nothing" is for what a layer costs before it computes anything.
SIZES = {
    "nothing": (8, 16, 4, 4, 16),
    "3M": (4, 160, 8, 4, 448),
    "8.6M": (8, 256, 8, 4, 704),
    "34M": (12, 448, 8, 4, 1216),
    "1B": (16, 2048, 32, 8, 8192),
}
PAIRS = 16
MICRO_BATCH = 4
ROWS = 32


def shape(size: str) -> Shape:
    layers, hidden, heads, groups, ffn = SIZES[size]
    return Shape(layers, hidden, heads, groups, hidden // heads, ffn, workload.VOCAB_SIZE)


def pairs() -> list[Pair]:
    """All of one length: what is measured is the layout."""
    return [
        Pair(example, workload.random_ids(workload.RESPONSE_TOKENS, 10_000 + example.index), "length", -500.0, -500.0)
        for example in workload.examples(PAIRS)
    ]


class Measured:
    """Seconds of a training step and of a decode step of this layout, by the clock."""

    def __init__(self, size: str, precision: str) -> None:
        self.gpt = build_gpt(llama(shape(size), workload.CONTEXT), precision)
        sched = SchedConfig(name="Constant", warmup_steps=0, constant_steps=0, min_lr=workload.LEARNING_RATE)
        optim = OptimConfig("distributed_fused_adam", (workload.LEARNING_RATE,), 0.1, (0.9, 0.98), 1e-8, sched)
        self.optimizer = Optimizer(self.gpt, optim, workload.CLIP)
        self.optimizer.start(workload.LEARNING_RATE, 1000)

    def training_step(self) -> float:
        data = pairs()

        def step() -> None:
            spin_step(self.optimizer, data, 0.1, workload.batching(MICRO_BATCH))

        return machine.seconds_of(step, times=1)

    def decode_step(self) -> float:
        """One token for each row: what responses take beyond their first token, which the prompts give."""
        rows = ROWS // parallel_state.get_data_parallel_world_size()
        generator = workload.generator(self.gpt, slots=rows)
        prompts = [workload.random_ids(workload.PROMPT_TOKENS, i) for i in range(rows)]

        def seconds(new_tokens: int) -> float:
            requests = [GenerationRequest(i, prompt, new_tokens) for i, prompt in enumerate(prompts)]
            return machine.seconds_of(lambda: generator.generate(requests, 0), times=1)

        longest = workload.RESPONSE_TOKENS
        return (seconds(longest) - seconds(1)) / (longest - 1)


def micro_batches(layout: Layout) -> Batch:
    """As this project feeds them: packed, prompts shared by the two answers, logits of answers only."""
    prompt, response = workload.PROMPT_TOKENS, workload.RESPONSE_TOKENS
    own = PAIRS // layout.dp
    size = min(MICRO_BATCH, own)
    return Batch(own // size, size * (prompt + 2 * response), (prompt + response) / 2, size * 2 * response)


def main() -> None:
    told = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    setup.initialize(told["tp"], told["pp"], seed=1)
    layout = Layout(told["tp"], told["pp"], parallel_state.get_data_parallel_world_size())
    device = setup.device()
    precision = "bf16" if device.type == "cuda" else "32"
    measured = Measured(told["size"], precision)
    found = {"size": told["size"], "tp": layout.tp, "pp": layout.pp, "dp": layout.dp, "rows": ROWS}
    found |= {"pairs": PAIRS, "train": measured.training_step(), "decode": measured.decode_step()}
    if told["layer_seconds"]:
        batch, model = micro_batches(layout), shape(told["size"])
        itemsize = torch.finfo(DTYPES[precision]).bits // 8
        held = model.parameters * itemsize // (layout.tp * layout.pp)
        for_training, for_decoding = told["layer_seconds"]
        sizes = (int(batch.tokens), model.hidden, model.ffn // layout.tp)
        constants = machine.measure(*sizes, held, device, DTYPES[precision], for_training)
        train = training_step(model, layout, constants, batch, sharded=True)
        length = workload.PROMPT_TOKENS + workload.RESPONSE_TOKENS / 2
        constants_of_rows = replace(constants, layer_seconds=for_decoding)
        decode = decode_step(model, layout, constants_of_rows, ROWS // layout.dp, length)
        found |= {"machine": asdict(constants), "predicted_train": asdict(train), "predicted_decode": asdict(decode)}
    if torch.distributed.get_rank() == 0:
        Path(told["result"]).write_text(json.dumps(found))
    setup.shutdown()


if __name__ == "__main__":
    main()
