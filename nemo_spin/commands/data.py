"""`nemo-spin data`: what training would make of data files, in words and figures, before a GPU-hour is spent."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterator, Sequence
from itertools import groupby
from typing import IO

import numpy as np

from nemo_spin.config import DatasetConfig
from nemo_spin.data.dataset import SFTDataset, load_dataset
from nemo_spin.data.load_report import LoadReport
from nemo_spin.data.tokenizer import TextTokenizer
from nemo_spin.errors import EXIT_CODE, DataError, printable
from nemo_spin.model_io.open import open_checkpoint
from nemo_spin.model_io.tokenizers import build_tokenizer
from nemo_spin.model_io.tokenizers.description import from_path

_NO_LIMIT = 2**31 - 1
_PERCENTILES = {"min": 0, "5%": 5, "50%": 50, "95%": 95, "99%": 99, "max": 100}
_CHARACTERS_SHOWN = 1600
# Everything that a terminal would obey, but for line breaks and tabs.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_TRAINED, _PLAIN = "\x1b[1;32m", "\x1b[0m"


def show_data(
    cfg: DatasetConfig,
    *,
    checkpoint: str | None,
    tokenizer_path: str | None,
    num_examples: int,
    out: IO[str] | None = None,
) -> int:
    """Write what was understood of the files to `out` (None: standard output), and return the exit code.

    cfg: the files and their options; max_seq_length None stands for the checkpoint's context, or no limit without one.
    checkpoint, tokenizer_path: one of the two, for the tokenizer.

    The exit code is 2 if training would refuse the files, 0 otherwise. Raises UserError where nothing can be shown.
    """
    out = out or sys.stdout
    tokenizer, context = _tokenizer(checkpoint, tokenizer_path)
    limit = min(cfg.max_seq_length or context, context)
    dataset = load_dataset(cfg, tokenizer, limit, refuse=False)
    for report in dataset.reports:
        print(*_summary(report), sep="\n", end="\n\n", file=out)
    if len(dataset):
        print(*_lengths(dataset), sep="\n", end="\n\n", file=out)
        stops = ", ".join(f"{_visible(tokenizer, token)} (id {token})" for token in sorted(dataset.stop_ids))
        print(f"A response ends with one of the stop tokens {stops}.", end="\n\n", file=out)
        _print_examples(dataset, tokenizer, num_examples, out)
    try:
        for report in dataset.reports:
            report.refuse(cfg.overlong, cfg.on_bad_record)
    except DataError as error:
        print(f"Training would refuse this: {error}", file=out)
        return EXIT_CODE
    return 0


def _tokenizer(checkpoint: str | None, tokenizer_path: str | None) -> tuple[TextTokenizer, int]:
    """The tokenizer, and the longest sequence that its checkpoint takes."""
    if checkpoint is None:
        return build_tokenizer(from_path(str(tokenizer_path))), _NO_LIMIT
    with open_checkpoint(checkpoint) as source:
        tokenizer = build_tokenizer(source.tokenizer, source.places)
        return tokenizer, source.architecture(tokenizer.vocab_size).max_sequence_length


def _summary(report: LoadReport) -> Iterator[str]:
    total = report.read + report.skipped_count
    longest = f", the longest of {report.longest:,} tokens" if report.read else ""
    yield f"{printable(report.path)}: {total:,} records, {report.kept:,} of them used{longest}"
    yield from (f"  {count:,} in the format {kind}" for kind, count in report.formats.items())
    yield from (f"  {loss}" for loss in report.losses())


def _lengths(dataset: SFTDataset) -> Iterator[str]:
    prompts, responses = dataset.lengths()
    yield f"{'length in tokens':<18}" + "".join(f"{name:>9}" for name in [*_PERCENTILES, "mean", "sum"])
    for name, lengths in {"prompt": prompts, "response": responses, "both": prompts + responses}.items():
        cells = [f"{np.percentile(lengths, q, method='nearest'):,}" for q in _PERCENTILES.values()]
        cells += [f"{lengths.mean():,.1f}", f"{lengths.sum(dtype=np.int64):,}"]
        yield f"{name:<18}" + "".join(f"{cell:>9}" for cell in cells)


def _print_examples(dataset: SFTDataset, tokenizer: TextTokenizer, number: int, out: IO[str]) -> None:
    """Examples from all over the data, with the trained tokens in another colour, or between marks."""
    begin, end = (_TRAINED, _PLAIN) if out.isatty() else ("«", "»")
    number = min(number, len(dataset))
    for index in sorted({round(i * (len(dataset) - 1) / max(number - 1, 1)) for i in range(number)}):
        example = dataset[index]
        prompt, response = _texts(tokenizer, example.prompt_ids, example.response_ids, dataset.stop_ids)
        print(f"--- example {index + 1:,} of {len(dataset):,}; trained is {begin}this{end}", file=out)
        print(f"{_shortened(prompt)}{begin}{_shortened(response)}{end}", file=out)
        rejected = dataset.given_rejected(index)
        if rejected is not None:
            _, text = _texts(tokenizer, example.prompt_ids, rejected, dataset.stop_ids)
            print(f"--- its given rejected response\n{_shortened(text)}", file=out)
        print(file=out)


def _texts(
    tokenizer: TextTokenizer, prompt_ids: Sequence[int], response_ids: Sequence[int], stop_ids: Collection[int]
) -> tuple[str, str]:
    """Prompt and response as text, their special tokens included."""
    special = {tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id} | set(stop_ids)
    prompt = _text(tokenizer, prompt_ids, special)
    both = _text(tokenizer, [*prompt_ids, *response_ids], special)
    # alone, a sentencepiece response would lose the space that it begins with
    return prompt, both[len(prompt) :] if both.startswith(prompt) else _text(tokenizer, response_ids, special)


def _text(tokenizer: TextTokenizer, ids: Sequence[int], special: Collection[int | None]) -> str:
    text = ""
    for is_special, group in groupby(ids, lambda token: token in special):
        run = list(group)
        text += "".join(_visible(tokenizer, token) for token in run) if is_special else tokenizer.decode(run)
    return text


def _visible(tokenizer: TextTokenizer, token: int) -> str:
    """A special token's text, or its role where the tokenizer has no text for it."""
    roles = {tokenizer.eos_id: "<eos>", tokenizer.bos_id: "<bos>"}
    return tokenizer.decode([token]).strip() or roles.get(token, f"<id {token}>")


def _shortened(text: str) -> str:
    """The text without characters that a terminal would obey, and without its middle where it is long."""
    text = _CONTROL.sub(lambda character: f"\\x{ord(character[0]):02x}", text)
    if len(text) <= _CHARACTERS_SHOWN:
        return text
    half = _CHARACTERS_SHOWN // 2
    return f"{text[:half]} [... {len(text) - 2 * half:,} more characters ...] {text[-half:]}"
