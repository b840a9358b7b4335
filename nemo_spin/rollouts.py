"""Making rollouts: the reference's own response to each prompt, and both reference log-probabilities."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel

from nemo_spin.generation.engine import GenerationRequest, Generator
from nemo_spin.megatron.steps import Batching, response_logps
from nemo_spin.pairs import Example

T = TypeVar("T")


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
    own = _own_share(examples)
    requests = [GenerationRequest(e.index, e.prompt_ids, max_new_tokens) for e in own]
    responses = generator.generate(requests, iteration, _phase(progress, "generating"))
    made = [(response.ids, response.finish_reason) for response in responses]
    return _shared(_score(gpt, own, made, batching, progress), len(examples))


def score_given(
    gpt: GPTModel,
    examples: Sequence[Example],
    given: Sequence[Sequence[int]],
    stop_ids: frozenset[int],
    batching: Batching,
    progress: Callable[[str, int], None] | None = None,
) -> list[Rollout]:
    """Rollouts of responses that the data bring along in place of the reference's own; as `roll_out` in all else."""
    made = [(ids, "stop" if ids[-1] in stop_ids else "length") for ids in _own_share(given)]
    return _shared(_score(gpt, _own_share(examples), made, batching, progress), len(examples))


def _score(
    gpt: GPTModel,
    examples: Sequence[Example],
    responses: Sequence[tuple[Sequence[int], str]],
    batching: Batching,
    progress: Callable[[str, int], None] | None,
) -> list[Rollout]:
    """responses: (token ids, finish reason) of the rejected response to each example."""
    prompts = [example.prompt_ids for example in examples]
    both = [example.response_ids for example in examples] + [ids for ids, _ in responses]
    logps = sequence_logps(gpt, prompts * 2, both, batching, _phase(progress, "scoring"))
    return [
        Rollout(example.index, array("i", ids), finish_reason, chosen, rejected)
        for example, (ids, finish_reason), chosen, rejected in zip(
            examples, responses, logps[: len(examples)], logps[len(examples) :], strict=True
        )
    ]


def sequence_logps(
    gpt: GPTModel,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    batching: Batching,
    progress: Callable[[int], None] | None = None,
) -> list[float]:
    """The log-probability of each whole response given its prompt, in nats. See `response_logps`."""
    return [float(logps.double().sum()) for logps in response_logps(gpt, prompts, responses, batching, progress)]


def _own_share(items: Sequence[T]) -> Sequence[T]:
    """Those that this data-parallel replica works on."""
    return items[parallel_state.get_data_parallel_rank() :: parallel_state.get_data_parallel_world_size()]


def _phase(progress: Callable[[str, int], None] | None, name: str) -> Callable[[int], None] | None:
    size = parallel_state.get_data_parallel_world_size()
    return None if progress is None else lambda count: progress(name, count * size)


def _shared(own: list[Rollout], count: int) -> list[Rollout]:
    """The rollouts of all replicas, in the order in which their examples were shared out."""
    size = parallel_state.get_data_parallel_world_size()
    shares: list[list[Rollout]] = [[]] * size
    dist.all_gather_object(shares, own, group=parallel_state.get_data_parallel_group())
    return [shares[i % size][i // size] for i in range(count)]
