"""Making rollouts: the reference's own response to each prompt, and both reference log-probabilities."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from nemo_spin.generation.interface import Engine, GenerationRequest, Response
from nemo_spin.megatron.agreement import gathered
from nemo_spin.megatron.steps import Batching, group_logps, response_logps
from nemo_spin.pairs import Example, ResponseGroup

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


@dataclass(frozen=True, slots=True)
class Answer:
    """A generated response that has not been scored yet. ids, finish_reason: as in `Rollout`."""

    ids: array
    finish_reason: str


def roll_out(
    gpt: GPTModel,
    generator: Engine,
    examples: Sequence[Example],
    iteration: int,
    max_new_tokens: int,
    batching: Batching,
    progress: Callable[[str, int], None] | None = None,
    answered: dict[int, Answer] | None = None,
    finished: Callable[[Response], None] | None = None,
    interrupted: Callable[[], bool] | None = None,
) -> list[Rollout] | None:
    """Generate a response to every example with the weights that `gpt` has now, and score both responses.

    Every process passes the same examples; data-parallel replicas share the work, and every process gets every
    rollout, in the order of the examples. max_new_tokens: the budget of each response, further limited by what its
    prompt leaves of the context. progress: told the phase ("generating" or "scoring") and how many more sequences are
    done, on all replicas if they are as fast as this one.

    answered: responses by the index of their example, which are scored with the others and not generated again; those
    that are generated now join them. finished: given each response of this replica as soon as it is generated.
    interrupted: see `Engine.generate`; replicas may answer differently. Returns None, on every process, if not all
    responses were generated.
    """
    answers = {} if answered is None else answered
    own = _own_share([example for example in examples if example.index not in answers])
    requests = [GenerationRequest(e.index, e.prompt_ids, max_new_tokens) for e in own]
    generated = generator.generate(requests, iteration, _phase(progress, "generating"), finished, interrupted)
    for share in _of_all_replicas({r.index: Answer(array("i", r.ids), r.finish_reason) for r in generated}):
        answers.update(share)
    if any(example.index not in answers for example in examples):
        return None
    # All examples, whoever generated what and when: which sequences go through the model together is seen in the last
    # bits of their log-probabilities.
    return _scored(gpt, examples, [answers[example.index] for example in examples], batching, progress)


def score_given(
    gpt: GPTModel,
    examples: Sequence[Example],
    given: Sequence[Sequence[int]],
    stop_ids: frozenset[int],
    batching: Batching,
    progress: Callable[[str, int], None] | None = None,
) -> list[Rollout]:
    """Rollouts of responses that the data bring along in place of the reference's own; as `roll_out` in all else."""
    answers = [Answer(array("i", ids), "stop" if ids[-1] in stop_ids else "length") for ids in given]
    return _scored(gpt, examples, answers, batching, progress)


def _scored(
    gpt: GPTModel,
    examples: Sequence[Example],
    answers: Sequence[Answer],
    batching: Batching,
    progress: Callable[[str, int], None] | None,
) -> list[Rollout]:
    """The rollouts of all examples, each replica scoring its share."""
    share = list(zip(_own_share(examples), _own_share(answers), strict=True))
    groups = [ResponseGroup(example.prompt_ids, (example.response_ids, answer.ids)) for example, answer in share]
    logps = group_logps(gpt, groups, batching, _phase(progress, "scoring"))
    shares = _of_all_replicas(
        [
            Rollout(example.index, answer.ids, answer.finish_reason, *map(_total, both))
            for (example, answer), both in zip(share, logps, strict=True)
        ]
    )
    return [shares[i % len(shares)][i // len(shares)] for i in range(len(examples))]


def sequence_logps(
    gpt: GPTModel,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    batching: Batching,
    progress: Callable[[int], None] | None = None,
) -> list[float]:
    """The log-probability of each whole response given its prompt, in nats. See `response_logps`."""
    return [_total(logps) for logps in response_logps(gpt, prompts, responses, batching, progress)]


def _total(per_token_logps: Tensor) -> float:
    return float(per_token_logps.double().sum())


def _own_share(items: Sequence[T]) -> Sequence[T]:
    """Those that this data-parallel replica works on."""
    return items[parallel_state.get_data_parallel_rank() :: parallel_state.get_data_parallel_world_size()]


def _phase(progress: Callable[[str, int], None] | None, name: str) -> Callable[[int], None] | None:
    size = parallel_state.get_data_parallel_world_size()
    return None if progress is None else lambda count: progress(name, count * size)


def _of_all_replicas(own: T) -> list[T]:
    """What each data-parallel replica has, on every process."""
    return gathered(own, parallel_state.get_data_parallel_group())
