"""Supervised fine-tuning with nemo_spin's own parts, on one process: makes the model from which SPIN starts.

python examples/quickstart/sft.py DIRECTORY SEED
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import nemo_spin.cli.silence_libraries  # noqa: F401
from nemo_spin.cli.launch import guarded

if TYPE_CHECKING:
    from nemo_spin import MegatronGPTSPINModel
    from nemo_spin.data.dataset import SFTDataset

LAYERS, HEADS, CONTEXT = 2, 4, 32
BATCH_SIZE, STEPS, LR = 64, 800, 1e-3


def new_model(tokenizer: Path, seed: int) -> MegatronGPTSPINModel:
    """A small Llama with random weights; the names of its configuration are NeMo 1's."""
    from omegaconf import OmegaConf

    from nemo_spin import MegatronGPTSPINModel

    config = {
        "mcore_gpt": True,
        "num_layers": LAYERS,
        "hidden_size": 128,
        "ffn_hidden_size": 384,
        "num_attention_heads": HEADS,
        "encoder_seq_length": CONTEXT,
        "max_position_embeddings": CONTEXT,
        "normalization": "rmsnorm",
        "activation": "fast-swiglu",
        "bias": False,
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": False,
        "precision": 32,
        "seed": seed,
        "tokenizer": {"library": "huggingface", "type": str(tokenizer)},
    }
    return MegatronGPTSPINModel(OmegaConf.create(config))


def load(model: MegatronGPTSPINModel, file: Path) -> SFTDataset:
    from numbers_in_words import PROMPT_TEMPLATE

    from nemo_spin.config import DatasetConfig
    from nemo_spin.data.dataset import load_dataset

    return load_dataset(DatasetConfig((str(file),), prompt_template=PROMPT_TEMPLATE), model.tokenizer, CONTEXT)


def fine_tune(
    model: MegatronGPTSPINModel, data: SFTDataset, steps: int, lr: float, warmup_steps: int, seed: int, label: str
) -> None:
    """So many optimizer steps of SFT with a cosine schedule, over as many epochs as they take."""
    from tqdm import tqdm

    from nemo_spin.config import OptimConfig, SchedConfig
    from nemo_spin.data.order import batches, epoch_order, num_batches
    from nemo_spin.megatron.optimizer import Optimizer
    from nemo_spin.megatron.steps import sft_step
    from nemo_spin.selfplay.pairs import group_of_example

    sched = SchedConfig("CosineAnnealing", warmup_steps=warmup_steps, constant_steps=0, min_lr=0.0)
    optim = OptimConfig("adam", (lr,), weight_decay=0.01, betas=(0.9, 0.98), eps=1e-8, sched=sched)
    optimizer = Optimizer(model.gpt, optim, gradient_clip_val=1.0)
    optimizer.start(lr, total_steps=steps)
    per_epoch = num_batches(len(data), BATCH_SIZE)
    with tqdm(total=steps, desc=label) as bar:
        for epoch in range(-(-steps // per_epoch)):
            order = epoch_order(len(data), seed, 0, epoch, shuffle=True)
            for batch in batches(data, order, BATCH_SIZE, limit_batches=min(per_epoch, steps - bar.n)):
                metrics = sft_step(optimizer, [group_of_example(e) for e in batch], model.batching(BATCH_SIZE))
                bar.set_postfix(loss=f"{metrics['loss']:.3f}", refresh=False)
                bar.update()


def main() -> None:
    directory, seed = Path(sys.argv[1]), int(sys.argv[2])
    model = new_model(directory / "tokenizer", seed)
    fine_tune(model, load(model, directory / "careless.jsonl"), STEPS, LR, 20, seed, "SFT")
    model.save_to(directory / "sft.nemo")


if __name__ == "__main__":
    sys.exit(guarded(main))
