"""A small SFT model from nothing but a JSONL file, for trying SPIN where no checkpoint is at hand.

    python examples/sft_from_scratch.py --train train.jsonl --validation validation.jsonl --output sft.nemo

Trains a sentencepiece tokenizer on the data and a Llama-like model on the responses, and writes a `.nemo`. One process;
under torchrun the processes are data parallel. It is a start for experiments, not a way to make a good model.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import nemo_spin.cli.silence_libraries  # noqa: F401
from nemo_spin.cli.launch import guarded


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="SFT of a small model from scratch.")
    add = parser.add_argument
    add("--train", required=True, help='JSONL with {"input", "output"}')
    add("--validation", required=True, help="JSONL, the same")
    add("--output", required=True, help="the .nemo to write")
    add("--vocab-size", type=int, default=1024, help="pieces of the tokenizer")
    add("--layers", type=int, default=4)
    add("--hidden-size", type=int, default=256)
    add("--heads", type=int, default=4)
    add("--query-groups", type=int, default=2)
    add("--context", type=int, default=512, help="longest sequence in tokens")
    add("--epochs", type=int, default=3)
    add("--batch-size", type=int, default=32, help="examples per step, over all processes")
    add("--micro-batch-size", type=int, default=8, help="examples per forward pass")
    add("--lr", type=float, default=2e-3)
    add("--seed", type=int, default=1)
    return parser.parse_args()


def train_tokenizer(files: list[str], vocab_size: int, directory: Path) -> str:
    """A sentencepiece model of the texts in these files; returns its path."""
    import sentencepiece

    from nemo_spin.data.jsonl import read_jsonl

    texts = [str(text) for file in files for _, record in read_jsonl(file) for text in record.values()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in texts for line in text.splitlines() if line),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=vocab_size,
        model_type="bpe",
        split_digits=True,
        user_defined_symbols=["\n"],  # else line breaks would be spaces
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return str(directory / "tokenizer.model")


def model_config(args: argparse.Namespace, tokenizer: str) -> dict:
    """A Llama in NeMo 1's names."""
    return {
        "mcore_gpt": True,
        "num_layers": args.layers,
        "hidden_size": args.hidden_size,
        "ffn_hidden_size": 8 * args.hidden_size // 3 // 8 * 8,
        "num_attention_heads": args.heads,
        "num_query_groups": args.query_groups,
        "encoder_seq_length": args.context,
        "max_position_embeddings": args.context,
        "normalization": "rmsnorm",
        "activation": "fast-swiglu",
        "bias": False,
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": False,
        "precision": "32",
        "seed": args.seed,
        "tokenizer": {"library": "sentencepiece", "model": tokenizer, "sentencepiece_legacy": False},
    }


def main() -> None:
    args = parse()
    from omegaconf import OmegaConf
    from tqdm import tqdm

    from nemo_spin.config import DatasetConfig, OptimConfig, SchedConfig
    from nemo_spin.data.dataset import load_dataset
    from nemo_spin.data.order import batches, epoch_order, num_batches
    from nemo_spin.megatron import setup, steps
    from nemo_spin.megatron.optimizer import Optimizer
    from nemo_spin.model import MegatronGPTSPINModel
    from nemo_spin.selfplay.pairs import group_of_example

    with tempfile.TemporaryDirectory() as directory:
        tokenizer = train_tokenizer([args.train, args.validation], args.vocab_size, Path(directory))
        model = MegatronGPTSPINModel(OmegaConf.create(model_config(args, tokenizer)))
    train, validation = (
        load_dataset(DatasetConfig((path,), overlong="drop"), model.tokenizer, args.context)
        for path in (args.train, args.validation)
    )
    print(*train.reports, *validation.reports, sep="\n")
    per_epoch = num_batches(len(train), args.batch_size)
    sched = SchedConfig(name="CosineAnnealing", warmup_steps=50, constant_steps=0, min_lr=args.lr / 10)
    optim = OptimConfig("adam", (args.lr,), weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8, sched=sched)
    optimizer = Optimizer(model.gpt, optim, gradient_clip_val=1.0)
    optimizer.start(args.lr, args.epochs * per_epoch)
    batching = model.batching(args.micro_batch_size)
    for epoch in range(args.epochs):
        order = epoch_order(len(train), args.seed, 0, epoch, shuffle=True)
        with tqdm(batches(train, order, args.batch_size), total=per_epoch, desc=f"SFT epoch {epoch}") as bar:
            for batch in bar:
                metrics = steps.sft_step(optimizer, [group_of_example(e) for e in batch], batching)
                bar.set_postfix(loss=f"{metrics['loss']:.3f}", refresh=False)
        nll, tokens = steps.sft_nll(model.gpt, [group_of_example(e) for e in validation], batching)
        print(f"after epoch {epoch}: validation NLL {nll / tokens:.4f} nats per token")
    model.save_to(args.output)
    print(f"Saved {args.output}")
    setup.shutdown()


if __name__ == "__main__":
    sys.exit(guarded(main))
