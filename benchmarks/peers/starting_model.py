"""Makes the model that both sides start from: a Llama of 8.6 million parameters that ends its answers by itself.

    python benchmarks/peers/starting_model.py DIRECTORY

It learns what `workloads.py` says of answers, in a minute or two, and is written by this project's own Hugging Face
export, with a tokenizer whose words are the ids.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import workload as base
import workloads
from llama import llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import nemo_spin.cli.silence_libraries  # noqa: F401
from nemo_spin.config import OptimConfig, SchedConfig
from nemo_spin.data.example import Example
from nemo_spin.megatron import setup, steps
from nemo_spin.megatron.gpt import build_gpt
from nemo_spin.megatron.optimizer import Optimizer
from nemo_spin.model_io.export import Content, LiveWeights, export
from nemo_spin.model_io.tokenizers import build_tokenizer
from nemo_spin.model_io.tokenizers.description import from_path
from nemo_spin.selfplay.pairs import group_of_example

STEPS, BATCH, LEARNING_RATE = 160, 16, 2e-3
SPECIAL = {workloads.PAD_ID: "<pad>", workloads.EOS_ID: "<eos>"}


def write_tokenizer(directory: Path) -> None:
    """The word of id 17 is t17."""
    words = {SPECIAL.get(i, f"t{i}"): i for i in range(workloads.VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>", padding_side="left"
    ).save_pretrained(directory)


def batch(step: int) -> list[Example]:
    """Answers of both kinds of lengths. The long ones are fewer: they have more tokens to learn from."""
    generator = random.Random(step)
    short, long = (w for w in workloads.WORKLOADS.values() if not w.equal)
    kinds = [short] * (BATCH * 3 // 4) + [long] * (BATCH // 4)
    return [
        Example(
            i,
            tuple(workloads.prompt(kind, generator)),
            (*workloads.answer(kind, generator)[: kind.max_new_tokens - 1], workloads.EOS_ID),
        )
        for i, kind in enumerate(kinds)
    ]


def make(directory: Path) -> None:
    """Write it; it appears when it is complete."""
    setup.initialize(1, 1, seed=1)
    torch.manual_seed(1)
    architecture = llama(base.SHAPE, workloads.CONTEXT)
    gpt = build_gpt(architecture, "32")
    sched = SchedConfig("CosineAnnealing", warmup_steps=10, constant_steps=0, min_lr=0.0)
    optimizer = Optimizer(gpt, OptimConfig("adamw", (LEARNING_RATE,), 0.0, base.BETAS, base.EPS, sched), base.CLIP)
    optimizer.start(LEARNING_RATE, STEPS)
    batching = steps.Batching(workloads.VOCAB_SIZE, workloads.PAD_ID, BATCH)
    for step in range(STEPS):
        metrics = steps.sft_step(optimizer, [group_of_example(e) for e in batch(step)], batching)
        if step % 20 == 0 or step == STEPS - 1:
            print(f"step {step}: loss {metrics['loss']:.3f}", file=sys.stderr, flush=True)
    words = directory.with_name(f"{directory.name}-tokenizer")
    write_tokenizer(words)
    tokenizer = build_tokenizer(from_path(str(words)))
    export(Content(architecture, LiveWeights(gpt, architecture), tokenizer), directory, "hf")
    setup.shutdown()


if __name__ == "__main__":
    make(Path(sys.argv[1]))
