"""What both sides work on: prompts, human answers and generated ones as token ids, the same for the same seed.

Standard library only: it is read in the environment of the peers too.

An answer has two parts, each of its own 64 ids; after every token the part ends with a fixed probability, and after the
second one comes EOS. A model learns that in a minute from pairs of neighbouring tokens, and then ends its answers by
itself, most of them early and a few late: with prompts of 7 to 15 tokens about 30% of the slots of a batch of 32 are
real tokens, as they were with docstrings and a model that had learned them.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

VOCAB_SIZE = 4096
PAD_ID, EOS_ID = 0, 1
_IDS_OF_A_PART = 64

Ids = list[int]


@dataclass(frozen=True)
class Workload:
    """A kind of data.

    pairs: of the set. prompt_tokens: fewest and most. parts: mean tokens of the two parts of an answer.
    max_new_tokens: of a generated answer. equal: all prompts are as long as the longest, and every answer, generated
        ones too, has exactly max_new_tokens.
    first_id: of the ids that it uses.
    """

    name: str
    pairs: int
    prompt_tokens: tuple[int, int]
    parts: tuple[float, float]
    max_new_tokens: int
    equal: bool
    first_id: int

    @property
    def context(self) -> int:
        """Tokens of the longest sequence."""
        return self.prompt_tokens[1] + self.max_new_tokens

    def reduced(self, divisor: int) -> Workload:
        """The same with fewer pairs."""
        return Workload(**(vars(self) | {"pairs": max(16, self.pairs // divisor)}))


_SHORT, _LONG = 2, 2 + 2 * _IDS_OF_A_PART
WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("short, skewed", 256, (7, 15), (16, 6), 96, False, _SHORT),
        Workload("short, equal", 256, (11, 11), (16, 6), 24, True, _SHORT),
        Workload("long, skewed", 64, (28, 60), (64, 24), 384, False, _LONG),
        Workload("long, equal", 64, (44, 44), (64, 24), 96, True, _LONG),
    )
}
MAIN = "short, skewed"
CONTEXT = max(workload.context for workload in WORKLOADS.values())


@dataclass(frozen=True)
class Texts:
    """Token ids of a workload: prompts, human answers with their EOS, and answers as a model might have generated."""

    prompts: list[Ids]
    chosen: list[Ids]
    rejected: list[Ids]

    @property
    def real_tokens(self) -> int:
        """Of the sequences that are trained on, each prompt counted with both of its answers."""
        return sum(
            2 * len(p) + len(c) + len(r) for p, c, r in zip(self.prompts, self.chosen, self.rejected, strict=True)
        )

    def padded_tokens(self, batch: int) -> int:
        """The same when batches of pairs, in their order, are padded to their longest sequence."""
        total = 0
        for start in range(0, len(self.prompts), batch):
            group = range(start, min(start + batch, len(self.prompts)))
            longest = max(len(self.prompts[i]) + max(len(self.chosen[i]), len(self.rejected[i])) for i in group)
            total += 2 * len(group) * longest
        return total


def texts(workload: Workload, seed: int) -> Texts:
    generator = random.Random(f"{workload.name} {seed}")
    prompts, chosen, rejected = [], [], []
    for _ in range(workload.pairs):
        prompts.append(prompt(workload, generator))
        # Human answers are never cut off; generated ones are, unless they were told to be of one length.
        longest = workload.max_new_tokens - 1
        chosen.append([*answer(workload, generator)[:longest], EOS_ID])
        generated = answer(workload, generator)
        rejected.append([*(generated[:longest] if workload.equal else generated), EOS_ID][: workload.max_new_tokens])
    return Texts(prompts, chosen, rejected)


def prompt(workload: Workload, generator: random.Random) -> Ids:
    return _ids(workload, 0, generator.randint(*workload.prompt_tokens), generator)


def answer(workload: Workload, generator: random.Random) -> Ids:
    """Without its EOS."""
    if workload.equal:
        return _ids(workload, 0, workload.max_new_tokens, generator)
    return [
        token
        for part, mean in enumerate(workload.parts)
        for token in _ids(workload, part, _geometric(mean, generator), generator)
    ]


def _geometric(mean: float, generator: random.Random) -> int:
    length = 1
    while generator.random() > 1 / mean:
        length += 1
    return length


def _ids(workload: Workload, part: int, count: int, generator: random.Random) -> Ids:
    first = workload.first_id + part * _IDS_OF_A_PART
    return [generator.randrange(first, first + _IDS_OF_A_PART) for _ in range(count)]


def write(data: Texts, directory: Path) -> None:
    """data.jsonl, as this project reads it, and rejected.json; `read` reads both back."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "data.jsonl", "w", encoding="utf-8") as file:
        for ids in zip(data.prompts, data.chosen, strict=True):
            print(json.dumps(dict(zip(("prompt_ids", "response_ids"), ids, strict=True))), file=file)
    (directory / "rejected.json").write_text(json.dumps(data.rejected), encoding="utf-8")


def read(directory: Path) -> Texts:
    records = [json.loads(line) for line in (directory / "data.jsonl").read_text(encoding="utf-8").splitlines()]
    return Texts(
        [record["prompt_ids"] for record in records],
        [record["response_ids"] for record in records],
        json.loads((directory / "rejected.json").read_text(encoding="utf-8")),
    )
