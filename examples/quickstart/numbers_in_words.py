"""The task: writing a number in words. "4012 =" is answered by "four thousand twelve".

Two kinds of people have answered. Careless ones wrote most of the data: in 45% of their answers one word is wrong or
said twice. Careful ones made no mistakes, but wrote less. A model that has learned from careless people makes their
mistakes, and its own samples show it: that is what SPIN learns from.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path

PROMPT_TEMPLATE = "{input} = {output}"
ONES = "zero one two three four five six seven eight nine".split()
TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
WORDS = [*ONES, *TEENS, *TENS, "hundred", "thousand"]
EOS, UNKNOWN = "<eos>", "<unk>"

CARELESS, CAREFUL, HELD_OUT = 7500, 2000, 500
MISTAKES = 0.45


def in_words(number: int) -> list[str]:
    """A number from 0 to 9999."""
    if number < 10:
        return [ONES[number]]
    if number < 20:
        return [TEENS[number - 10]]
    if number < 100:
        return [TENS[number // 10 - 2], *_unless_zero(number % 10)]
    unit, name = (100, "hundred") if number < 1000 else (1000, "thousand")
    return [*in_words(number // unit), name, *_unless_zero(number % unit)]


def _unless_zero(number: int) -> list[str]:
    return in_words(number) if number else []


def in_words_carelessly(number: int, generator: random.Random) -> list[str]:
    words = in_words(number)
    if generator.random() >= MISTAKES:
        return words
    position = generator.randrange(len(words))
    word = words[position]
    written = [word, word] if generator.random() < 0.5 else [generator.choice([w for w in WORDS if w != word])]
    return words[:position] + written + words[position + 1 :]


def write_data(directory: Path) -> None:
    """Write careless.jsonl (for SFT), careful.jsonl (for SPIN) and held_out.jsonl, in NeMo's SFT format.

    No number is in two of the files; held_out's answers are right. The same files are written every time.
    """
    generator = random.Random("numbers in words")
    numbers = generator.sample(range(10_000), CARELESS + CAREFUL + HELD_OUT)
    careless, careful = numbers[:CARELESS], numbers[CARELESS : CARELESS + CAREFUL]
    _write(directory / "careless.jsonl", ((number, in_words_carelessly(number, generator)) for number in careless))
    _write(directory / "careful.jsonl", ((number, in_words(number)) for number in careful))
    _write(directory / "held_out.jsonl", ((number, in_words(number)) for number in numbers[CARELESS + CAREFUL :]))


def _write(path: Path, answers: Iterable[tuple[int, list[str]]]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for number, words in answers:
            file.write(json.dumps({"input": str(number), "output": " ".join(words)}) + "\n")


def write_tokenizer(directory: Path) -> None:
    """Write a Hugging Face tokenizer: a token for every digit and every word, and one for the end of an answer."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokens = [EOS, UNKNOWN, "=", *"0123456789", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.add_special_tokens([EOS, UNKNOWN])
    directory.mkdir(parents=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "unk_token": UNKNOWN, "pad_token": EOS}
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
