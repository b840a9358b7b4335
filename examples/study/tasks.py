"""What a task is to the study: its data, its models, and what is said of an answer.

Data are files in NeMo's SFT format below a directory: sft.jsonl (the SFT model learned from it), train-N.jsonl (the
first N human answers that SPIN and further SFT train on) and held_out.jsonl. No record is in two of them, unless the
task says so.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama. label: its size in words."""

    label: str
    layers: int
    hidden_size: int
    heads: int = 4


@dataclass(frozen=True, slots=True)
class SFT:
    """How the SFT model is made. steps: optimizer steps of batch_size examples; lr: of Adam, at its peak."""

    steps: int
    lr: float
    batch_size: int
    weight_decay: float
    warmup_steps: int = 20


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure of a policy. better: "higher", "lower", or "half": the nearer to 0.5 the better. form: of a number."""

    key: str
    label: str
    better: str
    form: str = "{:.3f}"


NLL = Figure("nll", "NLL of human responses (nats per token)", "lower")
C2ST = Figure("c2st", "accuracy of a classifier: human or generated (0.5: it cannot tell)", "half")
KL = Figure("train/kl/late", "KL(opponent || policy), nats per response", "none")
LENGTH = Figure("length", "tokens of a sampled response", "none", "{:.1f}")


class Task(ABC):
    """context: tokens of the model. max_length: most tokens that are generated. template: of the data's records.

    overrides: what every SPIN run on this task is told over conf/gpt_spin_tiny.yaml. batch_size: pairs, or examples of
    further SFT, in a step. train, held_out: records that the SFT model learns from, and that are measured on.
    lr, epochs, beta: those of the overrides, for the control, for counting steps and for the report.
    """

    name: str
    label: str
    context: int
    max_length: int
    template: str
    sft: SFT
    shapes: dict[str, Shape]
    batch_size: int
    train: int
    held_out: int
    lr: float
    epochs: int
    beta: float
    overrides: tuple[str, ...]
    figures: tuple[Figure, ...]
    main_figure: Figure

    @abstractmethod
    def write_data(self, directory: Path) -> None:
        """Everything but train-N.jsonl, of which `pool.jsonl` has all; and the tokenizer."""

    @abstractmethod
    def tokenizer(self, directory: Path) -> dict[str, Any]:
        """`model.tokenizer` of a configuration."""

    @abstractmethod
    def features(self, prompt: Sequence[int], response: Sequence[int]) -> list[str]:
        """What the classifier that is to tell human from generated responses sees of one, from its tokens."""

    @abstractmethod
    def judge(self, answers: Sequence[str], records: Sequence[dict[str, str]]) -> dict[str, float]:
        """Figures of one answer, without its stop token, to each of the records; shares of them, by name."""

    def prepare(self, directory: Path) -> None:
        """Write the data unless they are there."""
        done = directory / "done"
        if done.exists():
            return
        directory.mkdir(parents=True, exist_ok=True)
        self.write_data(directory)
        done.touch()

    def train_file(self, directory: Path, examples: int) -> Path:
        """The first so many records to train on."""
        path = directory / f"train-{examples}.jsonl"
        if not path.exists():
            lines = (directory / "pool.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
            if len(lines) < examples:
                raise ValueError(f"{self.name} has {len(lines)} records to train on, {examples} are asked for.")
            # two workers may write it at the same time
            unfinished = path.with_name(f".{path.name}.{os.getpid()}")
            unfinished.write_text("".join(lines[:examples]), encoding="utf-8")
            os.replace(unfinished, path)
        return path

    def records(self, directory: Path) -> list[dict[str, str]]:
        """The held-out data."""
        lines = (directory / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def model_config(self, directory: Path, shape: Shape, seed: int) -> dict[str, Any]:
        """A model with random weights, in NeMo 1's names."""
        return {
            "mcore_gpt": True,
            "num_layers": shape.layers,
            "hidden_size": shape.hidden_size,
            "ffn_hidden_size": 8 * shape.hidden_size // 3 // 8 * 8,
            "num_attention_heads": shape.heads,
            "encoder_seq_length": self.context,
            "max_position_embeddings": self.context,
            "normalization": "rmsnorm",
            "activation": "fast-swiglu",
            "bias": False,
            "position_embedding_type": "rope",
            "share_embeddings_and_output_weights": False,
            "precision": 32,
            "seed": seed,
            "tokenizer": self.tokenizer(directory),
        }


def write_records(path: Path, records: Iterable[tuple[str, str]]) -> None:
    """Pairs of a prompt and its response."""
    with open(path, "w", encoding="utf-8") as file:
        for prompt, response in records:
            file.write(json.dumps({"input": prompt, "output": response}) + "\n")


def ngrams(tokens: Sequence[object], longest: int) -> list[str]:
    """All runs of up to so many tokens."""
    found = []
    for length in range(1, longest + 1):
        found += [" ".join(map(str, tokens[i : i + length])) for i in range(len(tokens) - length + 1)]
    return found
