"""`nemo-spin score`: the log-probability of each response of a file under a checkpoint."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from nemo_spin.commands.restoring import restored
from nemo_spin.data.encoder import RecordEncoder
from nemo_spin.data.records import read_records
from nemo_spin.errors import DataError, UserError
from nemo_spin.megatron.steps import response_logps
from nemo_spin.model import MegatronGPTSPINModel
from nemo_spin.model_io.open import open_checkpoint
from nemo_spin.runtime.collectives import is_main
from nemo_spin.runtime.files import written_whole

# Lines that are sorted by length together and held in memory.
_CHUNK = 4096


def score(
    checkpoint: str,
    model_options: dict[str, Any],
    data: str,
    output: str,
    micro_batch_size: int,
    record_options: dict[str, Any],
) -> None:
    """Write {"logp", "num_tokens", "token_logps"} for each line of `data`, in its order, in nats.

    model_options: precision, layout and tokenizer, as `MegatronGPTSPINModel.restore_from` takes them.
    A line holds text, a conversation, or {"prompt_ids", "response_ids"}; record_options: how it is read (see
    `RecordEncoder`). Every process of the run calls it. The output appears when it is whole. Raises UserError.
    """
    _check_paths(data, output)
    main = is_main()
    with open_checkpoint(checkpoint) as source:
        if source.chosen and main:
            print(f"{checkpoint}: {source.chosen}", file=sys.stderr)
    with restored(str(source.path), model_options) as model:
        encoder = RecordEncoder(model.tokenizer, **record_options)
        # All lines are checked before the first is scored.
        lines = [_encode(encoder, record, where, model) for where, record in read_records(data)]
        batching = model.batching(micro_batch_size)
        with _whole_file(Path(output), main) as file, tqdm(total=len(lines), disable=not main) as bar:
            for chunk in _chunks(lines):
                prompts, responses = zip(*chunk, strict=True)
                for logps in response_logps(model.gpt, prompts, responses, batching, bar.update):
                    values = logps.double().tolist()
                    scored = {"logp": sum(values), "num_tokens": len(values), "token_logps": values}
                    if file is not None:
                        file.write(json.dumps(scored) + "\n")


def _encode(
    encoder: RecordEncoder, record: dict, where: str, model: MegatronGPTSPINModel
) -> tuple[Sequence[int], Sequence[int]]:
    encoded = encoder.encode(record, where)
    prompt_ids, response_ids = encoded.prompt_ids, encoded.response_ids
    length, limit = len(prompt_ids) + len(response_ids), model.architecture.max_sequence_length
    if length > limit:
        raise DataError(f"{where}: prompt and response have {length} tokens, the model takes {limit}: shorten them.")
    return prompt_ids, response_ids


def _chunks(lines: Sequence) -> Iterator[list]:
    iterator = iter(lines)
    while chunk := list(islice(iterator, _CHUNK)):
        yield chunk


def _check_paths(data: str, output: str) -> None:
    if not Path(data).is_file():
        raise DataError(f"There is no file {data}: give the JSONL file to score as --data.")
    if Path(output).is_dir() or not Path(output).absolute().parent.is_dir():
        raise UserError(f"--output {output} cannot be written: name a file in a directory that exists.")


@contextmanager
def _whole_file(path: Path, write: bool) -> Iterator[IO[str] | None]:
    """A file that appears under its name when all has been written; None on processes other than the main one."""
    if not write:
        yield None
        return
    try:
        with written_whole(path) as unfinished, open(unfinished, "w", encoding="utf-8") as file:
            yield file
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): make room or choose another --output.") from None
