"""Held-out figures of a policy: its answers, the NLL, and whether a classifier can tell its answers from people's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tasks import Task

if TYPE_CHECKING:
    from nemo_spin import MegatronGPTSPINModel
    from nemo_spin.data.example import Example
    from nemo_spin.generation.interface import Response


class Meter:
    """Measures policies on the held-out data of a task. seed: of the sampled answers, the same for all policies."""

    def __init__(self, task: Task, directory: Path, seed: int) -> None:
        self.task = task
        self.seed = seed
        self.records = task.records(directory)
        self._file = directory / "held_out.jsonl"
        self._cache = directory / "cache"
        self._examples: list[Example] | None = None

    def measure(self, model: MegatronGPTSPINModel) -> dict[str, float]:
        from nemo_spin.megatron.steps import sft_nll
        from nemo_spin.selfplay.pairs import group_of_example

        examples, stop_ids = self._read(model)
        sampled = self._answers(model, examples, stop_ids, greedy=False)
        likeliest = self._answers(model, examples, stop_ids, greedy=True)
        nll, tokens = sft_nll(model.gpt, [group_of_example(e) for e in examples], model.batching(64))
        figures = self.task.judge(self._texts(model, sampled, stop_ids), self.records)
        greedy = self.task.judge(self._texts(model, likeliest, stop_ids), self.records)
        return (
            figures
            | {f"greedy_{name}": value for name, value in greedy.items()}
            | {
                "nll": nll / tokens,
                "length": sum(len(answer.ids) for answer in sampled) / len(sampled),
                "c2st": self.two_samples(
                    [example.prompt_ids for example in examples],
                    [example.response_ids for example in examples],
                    [answer.ids for answer in sampled],
                ),
            }
        )

    def two_samples(
        self, prompts: Sequence[Sequence[int]], human: Sequence[Sequence[int]], generated: Sequence[Sequence[int]]
    ) -> float:
        """Classifier two-sample test (Lopez-Paz and Oquab 2017): the accuracy of a logistic regression that was
        trained to tell human from generated responses on one half of the prompts, on the other half."""
        from sklearn.feature_extraction.text import CountVectorizer
        from sklearn.linear_model import LogisticRegression

        half = len(prompts) // 2
        seen, unseen = (
            [
                (self.task.features(prompts[i], responses[i]), label)
                for responses, label in ((human, 0), (generated, 1))
                for i in part
            ]
            for part in (range(half), range(half, len(prompts)))
        )
        vectorizer = CountVectorizer(analyzer=list, binary=True, min_df=2)
        inputs = vectorizer.fit_transform([features for features, _ in seen])
        classifier = LogisticRegression(C=0.1, max_iter=1000).fit(inputs, [label for _, label in seen])
        tested = vectorizer.transform([features for features, _ in unseen])
        return float(classifier.score(tested, [label for _, label in unseen]))

    def _read(self, model: MegatronGPTSPINModel) -> tuple[list[Example], frozenset[int]]:
        from nemo_spin.config import DatasetConfig
        from nemo_spin.data.dataset import load_dataset

        cfg = DatasetConfig((str(self._file),), prompt_template=self.task.template, cache_dir=str(self._cache))
        data = load_dataset(cfg, model.tokenizer, self.task.context)
        return list(data), data.stop_ids

    def _answers(
        self, model: MegatronGPTSPINModel, examples: Sequence[Example], stop_ids: frozenset[int], greedy: bool
    ) -> list[Response]:
        from nemo_spin.config import SamplingParams
        from nemo_spin.generation.engine import Generator
        from nemo_spin.generation.interface import GenerationRequest

        rules = model.generation_rules(
            SamplingParams(greedy, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, end_strings=()),
            min_length=1,
            stop_ids=stop_ids,
            seed=self.seed,
            context_length=self.task.context,
        )
        return Generator(model.gpt, rules, slots=256).generate(
            [GenerationRequest(i, example.prompt_ids, self.task.max_length) for i, example in enumerate(examples)],
            iteration=0,
        )

    @staticmethod
    def _texts(model: MegatronGPTSPINModel, answers: Sequence[Response], stop_ids: frozenset[int]) -> list[str]:
        return [model.tokenizer.decode([i for i in answer.ids if i not in stop_ids]) for answer in answers]


def standard_error(values: Sequence[float]) -> float:
    """Of the mean; NaN of a single value."""
    if len(values) < 2:
        return math.nan
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
