"""The synthetic task: the quick start's numbers in words, of which a right answer is known for every prompt.

Careless people wrote 45% of their answers with a mistake; the SFT model learned from them. Careful ones made none: SPIN
and further SFT train on theirs.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tasks import C2ST, LENGTH, NLL, SFT, Figure, Shape, Task, ngrams, write_records

sys.path.append(str(Path(__file__).resolve().parents[1] / "quickstart"))

from numbers_in_words import PROMPT_TEMPLATE, in_words, in_words_carelessly, write_tokenizer

ACCURACY = Figure("accuracy", "sampled answers that are right", "higher")


class Numbers(Task):
    name = "numbers"
    label = "numbers in words"
    context = 32
    max_length = 16
    template = PROMPT_TEMPLATE
    batch_size = 64
    train = 6500
    lr = 1e-4
    epochs = 2
    beta = 5.0
    figures = (ACCURACY, Figure("greedy_accuracy", "likeliest answers that are right", "higher"), NLL, C2ST, LENGTH)
    main_figure = ACCURACY
    overrides = (
        f"model.data.train_ds.prompt_template='{PROMPT_TEMPLATE}'",
        f"trainer.spin.max_epochs={epochs}",
        f"model.optim.lr={lr}",
        "model.optim.sched.min_lr=0",
        "model.optim.weight_decay=0.01",
        f"model.spin.ref_policy_kl_penalty={beta}",
        f"model.global_batch_size={batch_size}",
        f"model.micro_batch_size={batch_size}",
        "model.spin.rollout_batch_size=256",
        "model.spin.log_prob_forward_micro_batch_size=128",
        f"model.spin.length_params.max_length={max_length}",
    )

    def __init__(self, sft_steps: int, held_out: int, shapes: dict[str, Shape]) -> None:
        self.sft = SFT(sft_steps, 1e-3, 64, 0.01)
        self.held_out = held_out
        self.shapes = shapes

    def write_data(self, directory: Path) -> None:
        generator = random.Random("numbers in words, the study")
        careful, careless = 2048, self.train
        numbers = generator.sample(range(10_000), careful + careless + self.held_out)
        write_records(
            directory / "sft.jsonl",
            ((str(n), " ".join(in_words_carelessly(n, generator))) for n in numbers[careful : careful + careless]),
        )
        write_records(directory / "pool.jsonl", ((str(n), " ".join(in_words(n))) for n in numbers[:careful]))
        held_out = numbers[careful + careless :]
        write_records(directory / "held_out.jsonl", ((str(n), " ".join(in_words(n))) for n in held_out))
        write_tokenizer(directory / "tokenizer")

    def tokenizer(self, directory: Path) -> dict[str, Any]:
        return {"library": "huggingface", "type": str(directory / "tokenizer")}

    def features(self, prompt: Sequence[int], response: Sequence[int]) -> list[str]:
        # the digits from the right, each with the words of the answer: what is wrong shows only beside the prompt
        digits = list(enumerate(reversed(prompt[:-1])))
        together = [f"{place}:{digit}>{word}" for place, digit in digits for word in set(response)]
        return [*ngrams(response, 3), *together, f"length {len(response)}"]

    def judge(self, answers: Sequence[str], records: Sequence[dict[str, str]]) -> dict[str, float]:
        right = [answer.strip() == record["output"] for answer, record in zip(answers, records, strict=True)]
        return {"accuracy": sum(right) / len(right)}
