"""A data set in memory: all examples of a file, tokenized once and stored flat."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike

from nemo_spin.data.formats import RecordEncoder, is_chat
from nemo_spin.data.jsonl import read_jsonl
from nemo_spin.data.template import DEFAULT_LABEL_KEY, DEFAULT_TEMPLATE
from nemo_spin.data.tokenizer import TextTokenizer
from nemo_spin.errors import ConfigError, DataError
from nemo_spin.pairs import Example

_LINES_SHOWN = 5


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What became of a file's examples. `str()` says it in one line.

    dropped_prompt: dropped because the prompt alone leaves no room for a generated token.
    dropped_response: dropped because prompt and response together are longer than `max_seq_length`.
    longest: length of the longest example read, in tokens.
    """

    path: str
    read: int
    dropped_prompt: int
    dropped_response: int
    longest: int
    max_seq_length: int

    @property
    def kept(self) -> int:
        return self.read - self.dropped_prompt - self.dropped_response

    def __str__(self) -> str:
        line = f"{self.path}: read {self.read} examples, longest {self.longest} tokens"
        if self.kept == self.read:
            return line
        return (
            f"{line}; kept {self.kept}, dropped {self.read - self.kept} longer than {self.max_seq_length} "
            f"({self.dropped_prompt} by their prompt alone, {self.dropped_response} with their response)"
        )


class SFTDataset:
    """Prompts with their human responses. `dataset[i]` is the Example with index i, for i from 0 to len - 1.

    report: what was read and dropped.
    has_chat: whether any example is a conversation, so that generation stops at the chat template's end of turn too.
    """

    def __init__(self) -> None:
        self.report: LoadReport
        self.has_chat = False
        # One flat int32 array: example i is ids[starts[i]:starts[i + 1]], its response from responses[i] on.
        self._ids = array("i")
        self._starts = array("q", [0])
        self._responses = array("q")

    def append(self, prompt_ids: list[int], response_ids: list[int]) -> None:
        self._ids.extend(prompt_ids)
        self._responses.append(len(self._ids))
        self._ids.extend(response_ids)
        self._starts.append(len(self._ids))

    def __len__(self) -> int:
        return len(self._responses)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        start, response, end = self._starts[index], self._responses[index], self._starts[index + 1]
        return Example(index, tuple(self._ids[start:response]), tuple(self._ids[response:end]))

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))


def load_dataset(
    file_path: str | PathLike[str],
    tokenizer: TextTokenizer,
    *,
    max_seq_length: int,
    prompt_template: str = DEFAULT_TEMPLATE,
    label_key: str = DEFAULT_LABEL_KEY,
    add_bos: bool = False,
    add_eos: bool = True,
    overlong: str = "refuse",
) -> SFTDataset:
    """Read and tokenize a JSONL file; each record's format is found from its keys (see `formats`).

    max_seq_length: most tokens of prompt and response together. A prompt must leave room for one generated token.
    overlong: "refuse" a file with a longer example, or "drop" such examples and count them in `report`. None is cut.

    Raises ConfigError for a template or option that cannot be used, DataError for a file or line that cannot.
    """
    if overlong not in ("refuse", "drop"):
        raise ConfigError(f"overlong is {overlong!r}: use refuse or drop")
    encoder = RecordEncoder(
        tokenizer, prompt_template=prompt_template, label_key=label_key, add_bos=add_bos, add_eos=add_eos
    )
    dataset = SFTDataset()
    read = dropped_prompt = longest = 0
    overlong_lines: list[int] = []
    for line, record in read_jsonl(file_path):
        prompt_ids, response_ids = encoder.encode(record, f"{file_path}:{line}")
        length = len(prompt_ids) + len(response_ids)
        read += 1
        longest = max(longest, length)
        if length > max_seq_length:
            overlong_lines.append(line)
            dropped_prompt += len(prompt_ids) >= max_seq_length
            continue
        dataset.has_chat |= is_chat(record)
        dataset.append(prompt_ids, response_ids)

    if overlong_lines and overlong == "refuse":
        shown = ", ".join(map(str, overlong_lines[:_LINES_SHOWN])) + (", ..." * (len(overlong_lines) > _LINES_SHOWN))
        raise DataError(
            f"{file_path}: {len(overlong_lines)} of {read} examples are longer than max_seq_length = {max_seq_length} "
            f"tokens ({dropped_prompt} by their prompt alone), at line {shown}, the longest {longest}: "
            "raise max_seq_length as far as the model goes, or set overlong: drop"
        )
    if not len(dataset):
        raise DataError(
            f"{file_path}: all {read} examples are longer than max_seq_length = {max_seq_length} tokens, "
            f"the longest {longest}: raise max_seq_length or shorten the data"
        )
    dataset.report = LoadReport(
        path=str(file_path),
        read=read,
        dropped_prompt=dropped_prompt,
        dropped_response=len(overlong_lines) - dropped_prompt,
        longest=longest,
        max_seq_length=max_seq_length,
    )
    return dataset
