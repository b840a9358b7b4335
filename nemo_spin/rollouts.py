"""Rollouts: the reference's own responses to the prompts of an iteration, and both reference log-probabilities.

They are made once, kept in Parquet files that people can open, and used in every epoch of their iteration.
"""

from __future__ import annotations

import os
import shutil
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel

from nemo_spin.generation.engine import GenerationRequest, Generator
from nemo_spin.megatron.steps import Batching, response_logps
from nemo_spin.pairs import Example, Pair

SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("prompt", pa.string()),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("chosen_ids", pa.list_(pa.int32())),
        ("rejected_ids", pa.list_(pa.int32())),
        ("prompt_length", pa.int32()),
        ("chosen_length", pa.int32()),
        ("rejected_length", pa.int32()),
        ("finish_reason", pa.string()),
        ("ref_chosen_logps", pa.float64()),
        ("ref_rejected_logps", pa.float64()),
    ]
)


@dataclass(frozen=True, slots=True)
class Rollout:
    """What the reference made of one example.

    index: of the example.
    rejected_ids: int32 token ids as sampled, with the stop token if one was sampled.
    finish_reason: "stop" or "length".
    ref_chosen_logps, ref_rejected_logps: log-probability of the whole response under the reference, in nats.
    """

    index: int
    rejected_ids: array
    finish_reason: str
    ref_chosen_logps: float
    ref_rejected_logps: float


def roll_out(
    gpt: GPTModel,
    generator: Generator,
    examples: Sequence[Example],
    iteration: int,
    max_new_tokens: int,
    batching: Batching,
    progress: Callable[[str, int], None] | None = None,
) -> list[Rollout]:
    """Generate a response to every example with the weights that `gpt` has now, and score both responses.

    Every process passes the same examples; data-parallel replicas share the work, and every process gets every
    rollout, in the order of the examples. max_new_tokens: the budget of each response, further limited by what its
    prompt leaves of the context. progress: told the phase ("generating" or "scoring") and how many more sequences are
    done, on all replicas if they are as fast as this one.
    """
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()

    def phase(name: str) -> Callable[[int], None] | None:
        return None if progress is None else lambda count: progress(name, count * size)

    own = examples[rank::size]
    requests = [GenerationRequest(e.index, e.prompt_ids, max_new_tokens) for e in own]
    responses = generator.generate(requests, iteration, phase("generating"))
    prompts = [example.prompt_ids for example in own]
    both = [example.response_ids for example in own] + [response.ids for response in responses]
    logps = [float(t.double().sum()) for t in response_logps(gpt, prompts * 2, both, batching, phase("scoring"))]
    chosen_logps, rejected_logps = logps[: len(own)], logps[len(own) :]
    rollouts = [
        Rollout(example.index, array("i", response.ids), response.finish_reason, chosen, rejected)
        for example, response, chosen, rejected in zip(own, responses, chosen_logps, rejected_logps, strict=True)
    ]
    shares: list[list[Rollout]] = [[]] * size
    dist.all_gather_object(shares, rollouts, group=parallel_state.get_data_parallel_group())
    return [shares[i % size][i // size] for i in range(len(examples))]


class RolloutStore:
    """The rollouts of one iteration: in memory on every process, on disk for people and for resuming.

    directory: one Parquet file (schema `SCHEMA`) for each time rollouts were added; only process 0 writes.
    decode: token ids -> text, for the columns that people read.
    """

    def __init__(self, directory: Path, decode: Callable[[Sequence[int]], str]) -> None:
        self.directory = directory
        self._decode = decode
        self._rollouts: dict[int, Rollout] = {}

    def __len__(self) -> int:
        return len(self._rollouts)

    def missing(self, examples: Iterable[Example]) -> list[Example]:
        """Those of the examples that have no rollout yet, each once, in order of index."""
        wanted = {example.index: example for example in examples if example.index not in self._rollouts}
        return [wanted[index] for index in sorted(wanted)]

    def pair(self, example: Example) -> Pair:
        """The example with its rollout. Raises KeyError if it has none."""
        rollout = self._rollouts[example.index]
        return Pair(
            example,
            tuple(rollout.rejected_ids),
            rollout.finish_reason,
            rollout.ref_chosen_logps,
            rollout.ref_rejected_logps,
        )

    def add(self, examples: Sequence[Example], rollouts: Sequence[Rollout]) -> None:
        """Keep the rollouts of these examples, and write them to the next file of the directory."""
        if dist.get_rank() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            if not self._rollouts:
                self._remove_files()
            path = self.directory / f"part-{len(self.files()):05d}.parquet"
            unfinished = path.with_suffix(".tmp")
            try:
                pq.write_table(self._table(examples, rollouts), unfinished)
                os.replace(unfinished, path)
            finally:
                unfinished.unlink(missing_ok=True)
        self._rollouts.update((rollout.index, rollout) for rollout in rollouts)

    def files(self) -> list[Path]:
        return sorted(self.directory.glob("part-*.parquet"))

    def restore(self, files: Sequence[Path]) -> None:
        """Begin with the rollouts in these files; what the directory held before is removed."""
        if dist.get_rank() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._remove_files()
            for path in files:
                shutil.copyfile(path, self.directory / path.name)
        columns = ["index", "rejected_ids", "finish_reason", "ref_chosen_logps", "ref_rejected_logps"]
        for path in files:
            for row in pq.read_table(path, columns=columns).to_pylist():
                row["rejected_ids"] = array("i", row["rejected_ids"])
                self._rollouts[row["index"]] = Rollout(**row)

    def _remove_files(self) -> None:
        for path in self.files():
            path.unlink()

    def summary(self) -> dict[str, float]:
        """`rollout/*`: number of responses, mean tokens, share that ran into the length limit."""
        count = max(len(self._rollouts), 1)
        lengths = [len(rollout.rejected_ids) for rollout in self._rollouts.values()]
        cut_off = sum(rollout.finish_reason == "length" for rollout in self._rollouts.values())
        return {
            "rollout/responses": float(len(self._rollouts)),
            "rollout/length": sum(lengths) / count,
            "rollout/finish_reason_length": cut_off / count,
        }

    def _table(self, examples: Sequence[Example], rollouts: Sequence[Rollout]) -> pa.Table:
        rows = [
            {
                "index": rollout.index,
                "prompt": self._decode(example.prompt_ids),
                "chosen": self._decode(example.response_ids),
                "rejected": self._decode(rollout.rejected_ids),
                "prompt_ids": example.prompt_ids,
                "chosen_ids": example.response_ids,
                "rejected_ids": rollout.rejected_ids,
                "prompt_length": len(example.prompt_ids),
                "chosen_length": len(example.response_ids),
                "rejected_length": len(rollout.rejected_ids),
                "finish_reason": rollout.finish_reason,
                "ref_chosen_logps": rollout.ref_chosen_logps,
                "ref_rejected_logps": rollout.ref_rejected_logps,
            }
            for example, rollout in zip(examples, rollouts, strict=True)
        ]
        return pa.Table.from_pylist(rows, schema=SCHEMA)
