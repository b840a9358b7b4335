"""What is not finite in a step that was skipped, and the file that says which batch ended a run for that reason."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from nemo_spin.data.dataset import SFTDataset
from nemo_spin.data.example import Example
from nemo_spin.data.records import read_records
from nemo_spin.errors import DataError
from nemo_spin.megatron.finite import gradients_not_finite, weights_not_finite
from nemo_spin.megatron.steps import Batching, group_logps
from nemo_spin.runtime.collectives import of_first
from nemo_spin.runtime.files import written_whole
from nemo_spin.runtime.progress import Progress
from nemo_spin.selfplay.pairs import Pair, group_of_pair, has_finite_logps


@dataclass(frozen=True, slots=True)
class ResponseLogps:
    """The policy's log-probability of a response, computed again without a backward pass.

    total: of the whole response, in nats. bad_tokens: positions in the response, from 0, whose own is not finite.
    """

    total: float
    bad_tokens: tuple[int, ...]

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.total)


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """chosen, rejected: of each pair. weights, gradients: names of parameters where they hold NaN or infinity."""

    chosen: list[ResponseLogps]
    rejected: list[ResponseLogps]
    weights: list[str]
    gradients: list[str]


def diagnose(gpt: GPTModel, pairs: Sequence[Pair], batching: Batching) -> Diagnosis:
    """Look at the model, at the gradients of its last backward pass, and at a global batch; every process calls it."""
    both = group_logps(gpt, [group_of_pair(pair) for pair in pairs], batching)
    chosen, rejected = ([_of_response(values) for values in one] for one in zip(*both, strict=True))
    return Diagnosis(chosen, rejected, weights_not_finite(gpt), gradients_not_finite(gpt))


def _of_response(logps: Tensor) -> ResponseLogps:
    bad = (~logps.isfinite()).nonzero().flatten().tolist()
    return ResponseLogps(float(logps.double().sum()), tuple(bad))


def write_report(
    run_dir: Path,
    progress: Progress,
    figures: dict[str, float | str],
    pairs: Sequence[Pair],
    diagnosis: Diagnosis,
    dataset: SFTDataset,
    decode: Callable[[Sequence[int]], str],
) -> str:
    """Write `non_finite_step_NNNNNNN.json` into the run's directory; every process calls it, the first one writes.

    progress: has counted the step. figures: of the step, as they are: loss, grad_norm, lr, beta, precision.
    Returns in words where the report is, or why there is none, when it has been written.
    """

    def write() -> str:
        path = run_dir / f"non_finite_step_{progress.step:07d}.json"
        counts = {name: value for name, value in progress.state_dict().items() if name != "iteration_step"}
        report = counts | {
            **figures,
            "weights_not_finite": diagnosis.weights,
            "gradients_not_finite": diagnosis.gradients,
            "what_to_do": advice(diagnosis, pairs),
            "pairs": _pairs(pairs, diagnosis, dataset, decode),
        }
        text = json.dumps(_as_json(report), indent=2, ensure_ascii=False) + "\n"
        try:
            with written_whole(path) as unfinished:
                unfinished.write_text(text, encoding="utf-8")
        except OSError as error:
            return f"The batch could not be written to {path} ({error.strerror})"
        return f"The batch is in {path}"

    # The others end when this returns, and with them the process that writes.
    return of_first(write)


def advice(diagnosis: Diagnosis, pairs: Sequence[Pair]) -> str:
    """What to do, from the first cause that the diagnosis allows for."""
    if diagnosis.weights:
        return (
            "Weights of the model are not finite. Start from an earlier checkpoint of the run, or from another SFT "
            "checkpoint if none is sound, with a lower model.optim.lr."
        )
    if not all(map(has_finite_logps, pairs)):
        return (
            "The reference gives no finite log-probabilities to these responses. See what is odd about them, and try "
            "trainer.precision=32."
        )
    if not all(logps.is_finite for logps in diagnosis.chosen + diagnosis.rejected):
        return (
            "The weights are finite, but the policy's log-probabilities of the pairs that are marked are not. See what "
            "is odd about these examples and remove them, or try trainer.precision=32."
        )
    if diagnosis.gradients:
        return (
            "Weights and log-probabilities are finite, and the gradient is not. Try trainer.precision=32 and a lower "
            "model.optim.lr. If the same batch passes on other devices, one of these computes wrongly."
        )
    return (
        "Nothing that was looked at again is NaN or infinite: the gradient's norm is too large for fp32, or one of the "
        "devices computes wrongly. Lower model.optim.lr or model.spin.ref_policy_kl_penalty, or try other devices."
    )


def _pairs(
    pairs: Sequence[Pair], diagnosis: Diagnosis, dataset: SFTDataset, decode: Callable[[Sequence[int]], str]
) -> list[dict[str, Any]]:
    """Those of which something is not finite first."""
    where = places(dataset, [pair.example for pair in pairs])
    rows = []
    for pair, chosen, rejected in zip(pairs, diagnosis.chosen, diagnosis.rejected, strict=True):
        values = {
            "logps_chosen": chosen.total,
            "logps_rejected": rejected.total,
            "ref_logps_chosen": pair.ref_chosen_logps,
            "ref_logps_rejected": pair.ref_rejected_logps,
        }
        rows.append(
            {
                "index": pair.example.index,
                "where": where[pair.example.index],
                "not_finite": [name for name, value in values.items() if not math.isfinite(value)],
                **values,
                "bad_tokens_chosen": chosen.bad_tokens,
                "bad_tokens_rejected": rejected.bad_tokens,
                "finish_reason": pair.finish_reason,
                "prompt_length": len(pair.example.prompt_ids),
                "chosen_length": len(pair.example.response_ids),
                "rejected_length": len(pair.rejected_ids),
                "prompt": decode(pair.example.prompt_ids),
                "chosen": decode(pair.example.response_ids),
                "rejected": decode(pair.rejected_ids),
            }
        )
    return sorted(rows, key=lambda row: not row["not_finite"])


def places(dataset: SFTDataset, examples: Sequence[Example]) -> dict[int, str]:
    """Where each example, by its index, stands in the data: "file:line", or its number among those that were kept."""
    found = {}
    last = Counter[int]()
    numbers = {}
    for example in examples:
        file, row = dataset.place(example.index)
        numbers[example.index] = file, row
        last[file] = max(last[file], row + 1)
    records = {file: _records(dataset, file, count) for file, count in last.items()}
    for index, (file, row) in numbers.items():
        path = dataset.reports[file].path
        known = records[file]
        found[index] = known[row] if row < len(known) else f"{path}, example {row + 1} of those that were kept"
    return found


def _records(dataset: SFTDataset, file: int, count: int) -> list[str]:
    """The places of a file's first records; none where some were left out, so that examples are not numbered alike."""
    report = dataset.reports[file]
    if report.kept != report.read or report.skipped_count:
        return []
    try:
        return [where for where, _ in islice(read_records(report.path), count)]
    except DataError:
        return []


def _as_json(value: Any) -> Any:
    """JSON has no NaN: numbers that are not finite become text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    return value
