"""Real human text: GSM8K, school mathematics with worked answers; the shorter ones, for a model from scratch.

As in the paper, SPIN trains on the very data that the SFT model has learned from.
"""

from __future__ import annotations

import ast
import json
import operator
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tasks import C2ST, LENGTH, NLL, SFT, Figure, Shape, Task, ngrams, write_records

sys.path.append(str(Path(__file__).resolve().parents[1]))

FILES = ("train.jsonl", "validation.jsonl")
VOCABULARY = 1024
_EQUATION = re.compile(r"<<([-+*/().\d\s]+)=\s*(-?[\d.]+)>>")
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
_ANSWER = re.compile(r"\n#### (-?[\d,]*\.?\d+)$")


class GSM8K(Task):
    name = "gsm8k"
    label = "GSM8K"
    context = 192
    max_length = 160
    template = "{input} {output}"
    batch_size = 32
    lr = 1e-4
    epochs = 1
    beta = 5.0
    figures = (
        NLL,
        C2ST,
        Figure("well_formed", 'answers that end with "#### number"', "higher"),
        Figure("equations", "<<equations>> that are right, of those in the answers", "higher"),
        Figure("accuracy", "final answers that are right", "higher"),
        Figure("greedy_well_formed", 'likeliest answers that end with "#### number"', "higher"),
        Figure("greedy_equations", "<<equations>> that are right in likeliest answers", "higher"),
        LENGTH,
    )
    main_figure = C2ST
    overrides = (
        f"trainer.spin.max_epochs={epochs}",
        f"model.optim.lr={lr}",
        "model.optim.sched.min_lr=0",
        "model.optim.weight_decay=0.01",
        f"model.spin.ref_policy_kl_penalty={beta}",
        f"model.global_batch_size={batch_size}",
        f"model.micro_batch_size={batch_size}",
        "model.spin.rollout_batch_size=256",
        "model.spin.log_prob_forward_micro_batch_size=32",
        f"model.spin.length_params.max_length={max_length}",
        "model.data.train_ds.overlong=drop",
    )

    def __init__(self, source: Path, sft_steps: int, train: int, held_out: int, shapes: dict[str, Shape]) -> None:
        self.source = source
        self.sft = SFT(sft_steps, 3e-3, 16, 0.1)
        self.train = train
        self.held_out = held_out
        self.shapes = shapes

    def write_data(self, directory: Path) -> None:
        from sft_from_scratch import train_tokenizer

        model = train_tokenizer([str(self.source / name) for name in FILES], VOCABULARY, directory)
        records = list(_short_enough(self.source, model, self.context))
        train, held_out = records[: self.train], records[self.train : self.train + self.held_out]
        for name, part in {"sft": train, "pool": train, "held_out": held_out}.items():
            write_records(directory / f"{name}.jsonl", part)

    def tokenizer(self, directory: Path) -> dict[str, Any]:
        return {"library": "sentencepiece", "model": str(directory / "tokenizer.model"), "sentencepiece_legacy": False}

    def features(self, prompt: Sequence[int], response: Sequence[int]) -> list[str]:
        asked = set(prompt)
        # a person takes up the words and numbers of the question
        taken_up = sum(token in asked for token in response) / max(len(response), 1)
        return [*ngrams(response, 2), f"length {len(response) // 10}", f"taken up {round(10 * taken_up)}"]

    def judge(self, answers: Sequence[str], records: Sequence[dict[str, str]]) -> dict[str, float]:
        numbers = [_final_number(answer) for answer in answers]
        right = [
            number is not None and number == _final_number(record["output"])
            for number, record in zip(numbers, records, strict=True)
        ]
        equations = [ok for answer in answers for ok in _equations(answer)]
        return {
            "well_formed": sum(number is not None for number in numbers) / len(numbers),
            "equations": sum(equations) / max(len(equations), 1),
            "equations_per_answer": len(equations) / len(answers),
            "accuracy": sum(right) / len(right),
        }


def is_there(directory: Path) -> bool:
    return all((directory / name).is_file() for name in FILES)


def _short_enough(source: Path, tokenizer: str, context: int):
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=tokenizer)
    for name in FILES:
        with open(source / name, encoding="utf-8") as file:
            for line in file:
                record = json.loads(line)
                # a space and the end-of-sequence token come to what is counted here
                if sum(len(pieces.encode(text)) for text in record.values()) <= context - 2:
                    yield record["input"], record["output"]


def _final_number(answer: str) -> float | None:
    """What stands after "####" in the last line, as people wrote it; None if there is none."""
    found = _ANSWER.search(answer.strip())
    return float(found[1].replace(",", "")) if found else None


def _equations(answer: str) -> list[bool]:
    """Whether each <<a*b=c>> is right, to two decimals."""
    found = []
    for left, right in _EQUATION.findall(answer):
        try:
            found.append(abs(_value(ast.parse(left.strip(), mode="eval").body) - float(right)) < 0.01)
        except (SyntaxError, ValueError, ArithmeticError):
            found.append(False)
    return found


def _value(term: ast.expr) -> float:
    """Of numbers, with + - * / and brackets between them. Raises ValueError for anything else."""
    if isinstance(term, ast.Constant) and isinstance(term.value, int | float):
        return float(term.value)
    if isinstance(term, ast.UnaryOp) and isinstance(term.op, ast.USub):
        return -_value(term.operand)
    if isinstance(term, ast.BinOp) and type(term.op) in _OPERATORS:
        return _OPERATORS[type(term.op)](_value(term.left), _value(term.right))
    raise ValueError("no sum of numbers")
