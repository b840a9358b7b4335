"""Making rollouts: the reference's own responses to each prompt, and the reference's log-probabilities."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from nemo_spin.data.example import Example
from nemo_spin.generation.interface import Engine, GenerationRequest, Response
from nemo_spin.megatron.sequences import ResponseGroup
from nemo_spin.megatron.steps import Batching, group_logps, response_logps
from nemo_spin.runtime.collectives import gathered

T = TypeVar("T")


Key = tuple[int, int]
"""What a response is known by: the index of its example, and its number among the responses to it, from 0."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """A response that the reference has made to the prompt of an example.

    index: of the example. sample: number of the response among those to its prompt.
    rejected_ids: int32 token ids as sampled, with the stop token if one was sampled.
    finish_reason: "stop" or "length".
    ref_chosen_logps, ref_rejected_logps: log-probability of the whole response under the reference, in nats.
    """

    index: int
    rejected_ids: array
    finish_reason: str
    ref_chosen_logps: float
    ref_rejected_logps: float
    sample: int = 0

    @property
    def key(self) -> Key:
        return self.index, self.sample


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
    answered: dict[Key, Answer] | None = None,
    finished: Callable[[Response], None] | None = None,
    interrupted: Callable[[], bool] | None = None,
    num_generations: int = 1,
) -> list[Rollout] | None:
    """Generate responses to every example with the weights that `gpt` has now, and score them and the human one.

    Every process passes the same examples; data-parallel replicas share the work, and every process gets every
    rollout, in the order of the examples and of their `num_generations` samples. max_new_tokens: the budget of each
    response, further limited by what its prompt leaves of the context. progress: told the phase ("generating" or
    "scoring") and how many more sequences are done, on all replicas if they are as fast as this one.

    answered: responses, which are scored with the others and not generated again; those
    that are generated now join them. finished: given each response of this replica as soon as it is generated.
    interrupted: see `Engine.generate`; replicas may answer differently. Returns None, on every process, if not all
    responses were generated.
    """
    answers = {} if answered is None else answered
    samples = range(num_generations)
    requests = [
        GenerationRequest(example.index, example.prompt_ids, max_new_tokens, sample)
        for example in _own_share([e for e in examples if any((e.index, sample) not in answers for sample in samples)])
        for sample in samples
        if (example.index, sample) not in answers
    ]
    generated = generator.generate(requests, iteration, _phase(progress, "generating"), finished, interrupted)
    own = {(r.index, r.sample): Answer(array("i", r.ids), r.finish_reason) for r in generated}
    for share in _of_all_replicas(own):
        answers.update(share)
    if any((example.index, sample) not in answers for example in examples for sample in samples):
        return None
    # All examples, whoever generated what and when: which sequences go through the model together is seen in the last
    # bits of their log-probabilities.
    given = [[answers[example.index, sample] for sample in samples] for example in examples]
    return score(gpt, examples, given, batching, progress)


def score(
    gpt: GPTModel,
    examples: Sequence[Example],
    answers: Sequence[Sequence[Answer]],
    batching: Batching,
    progress: Callable[[str, int], None] | None = None,
) -> list[Rollout]:
    """Rollouts of responses that are there already, those to each example numbered in their order.

    Each data-parallel replica scores its share; prompt and human response are computed once for all responses to it.
    In all else as `roll_out`.
    """
    share = list(zip(_own_share(examples), _own_share(answers), strict=True))
    groups = [ResponseGroup(e.prompt_ids, (e.response_ids, *(a.ids for a in given))) for e, given in share]
    logps = group_logps(gpt, groups, batching, _phase(progress, "scoring"))
    shares = _of_all_replicas(
        [
            [
                Rollout(example.index, answer.ids, answer.finish_reason, _total(chosen), _total(rejected), sample)
                for sample, (answer, rejected) in enumerate(zip(given, of_given, strict=True))
            ]
            for (example, given), (chosen, *of_given) in zip(share, logps, strict=True)
        ]
    )
    return [rollout for i in range(len(examples)) for rollout in shares[i % len(shares)][i // len(shares)]]


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
