"""Held-out figures of the SFT model, of the policy after each SPIN iteration, and of further SFT on the same data.

Run as compare.py DIRECTORY SEED LR, LR being SPIN's learning rate: reads what run.py, sft.py and `nemo-spin train` left
there, and writes DIRECTORY/figures.json. Checkpoints know nothing of the layout that they were written in, so one
process can read those of a run with tensor and pipeline parallelism.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import nemo_spin.cli.silence_libraries  # noqa: F401
from nemo_spin.cli.launch import guarded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nemo_spin import MegatronGPTSPINModel
    from nemo_spin.data.dataset import SFTDataset
    from nemo_spin.generation.interface import Response

SAMPLES = 8
LONGEST = 16


@dataclass
class Figures:
    """What a policy does with the held-out prompts.

    accuracy: share of sampled answers (temperature 1) that are right to the last word. greedy_accuracy: the same of the
    most likely answer. nll: mean over the tokens of right answers, in nats. length: mean tokens of sampled answers, the
    end-of-sequence token included. margin: by how much more than its opponent it prefers right answers to the
    opponent's samples, in nats (without beta); None where there was no opponent.
    examples: the first sample for each of the first prompts.
    """

    name: str
    accuracy: float
    greedy_accuracy: float
    nll: float
    length: float
    margin: float | None
    examples: list[str]


class Judge:
    """Measures one policy after the other; each is the opponent of the next unless told otherwise."""

    def __init__(self, held_out: SFTDataset, seed: int) -> None:
        self.examples = list(held_out)
        self.seed = seed
        self._opponent: tuple[list[Response], list[float], list[float]] | None = None

    def measure(self, name: str, model: MegatronGPTSPINModel, in_self_play: bool) -> Figures:
        right_logps = self._logps(model, [example.response_ids for example in self.examples], repeat=1)
        samples = self._generate(model, SAMPLES, greedy=False)
        tokens = sum(len(example.response_ids) for example in self.examples)
        margin = None
        if in_self_play:
            if self._opponent is not None:
                theirs, right_before, theirs_before = self._opponent
                theirs_now = self._logps(model, [sample.ids for sample in theirs], repeat=SAMPLES)
                margin = _mean(right_logps) - _mean(right_before) - (_mean(theirs_now) - _mean(theirs_before))
            self._opponent = samples, right_logps, self._logps(model, [s.ids for s in samples], repeat=SAMPLES)
        return Figures(
            name,
            accuracy=self._accuracy(samples, SAMPLES),
            greedy_accuracy=self._accuracy(self._generate(model, 1, greedy=True), 1),
            nll=-sum(right_logps) / tokens,
            length=_mean([len(sample.ids) for sample in samples]),
            margin=margin,
            examples=[model.tokenizer.decode(sample.ids[:-1]) for sample in samples[: 3 * SAMPLES : SAMPLES]],
        )

    def _generate(self, model: MegatronGPTSPINModel, per_prompt: int, greedy: bool) -> list[Response]:
        from nemo_spin.config import SamplingParams
        from nemo_spin.generation.engine import Generator
        from nemo_spin.generation.interface import GenerationRequest

        rules = model.generation_rules(
            SamplingParams(greedy, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, end_strings=()),
            min_length=1,
            stop_ids=frozenset({model.tokenizer.eos_id}),
            seed=self.seed,
            context_length=model.architecture.max_sequence_length,
        )
        generator = Generator(model.gpt, rules, slots=500)
        prompts = [example.prompt_ids for example in self.examples for _ in range(per_prompt)]
        return generator.generate([GenerationRequest(i, prompt, LONGEST) for i, prompt in enumerate(prompts)], 0)

    def _logps(self, model: MegatronGPTSPINModel, responses: list[Sequence[int]], repeat: int) -> list[float]:
        from nemo_spin.megatron.steps import response_logps

        prompts = [example.prompt_ids for example in self.examples for _ in range(repeat)]
        return [float(logps.sum()) for logps in response_logps(model.gpt, prompts, responses, model.batching(250))]

    def _accuracy(self, answers: list[Response], per_prompt: int) -> float:
        right = [example.response_ids for example in self.examples for _ in range(per_prompt)]
        return _mean([tuple(answer.ids) == ids for answer, ids in zip(answers, right, strict=True)])


def _mean(values: list) -> float:
    return sum(values) / len(values)


def measure_all(directory: Path, seed: int, spin_lr: float) -> list[Figures]:
    from sft import fine_tune, load

    from nemo_spin import MegatronGPTSPINModel
    from nemo_spin.model_io.stores.torch_dist import TorchDistStore
    from nemo_spin.model_io.weights import load_weights

    model = MegatronGPTSPINModel.restore_from(str(directory / "sft.nemo"))
    judge = Judge(load(model, directory / "held_out.jsonl"), seed)
    figures = [judge.measure("SFT", model, in_self_play=True)]
    steps = 0
    for checkpoint in sorted((directory / "spin" / "checkpoints").glob("iteration-*")):
        progress = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["progress"]
        steps = progress["step"]
        load_weights(model.gpt, TorchDistStore(checkpoint / "shards", "", str(checkpoint)), str(checkpoint))
        ended = progress["iteration"] - 1  # the checkpoint stands at the start of the next
        figures.append(judge.measure(f"SPIN, iteration {ended}", model, in_self_play=True))
    # The learning rate that is best for SPIN need not be the best for SFT.
    for lr in (spin_lr, 0.3 * spin_lr):
        model = MegatronGPTSPINModel.restore_from(str(directory / "sft.nemo"))
        name = f"further SFT, lr {lr:.0e}"
        fine_tune(model, load(model, directory / "careful.jsonl"), steps, lr, 5, seed, name)
        figures.append(judge.measure(name, model, in_self_play=False))
    return figures


def main() -> None:
    directory, seed, lr = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    figures = [asdict(row) for row in measure_all(directory, seed, lr)]
    (directory / "figures.json").write_text(json.dumps(figures, indent=2), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(guarded(main))
