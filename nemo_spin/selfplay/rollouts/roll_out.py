"""Making rollouts: the reference generates responses to prompts, then scores them and the human responses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel

from nemo_spin.data.example import Example
from nemo_spin.generation.interface import Engine, GenerationRequest, Key, Response
from nemo_spin.megatron.sequences import ResponseGroup
from nemo_spin.megatron.steps import Batching, group_logps
from nemo_spin.runtime.collectives import gathered
from nemo_spin.selfplay.pairs import Rollout

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RolloutRequest:
    """Which rollouts to make. Every process makes the same request; only its callbacks may differ.

    examples: whose prompts are responded to, and whose human responses are scored as well.
    iteration: the random numbers of a response depend on it.
    num_generations: responses to each prompt.
    known: responses that are there already; they are scored, but not generated.
    progress: told the phase ("generating" or "scoring") and how many more sequences are done, over all data-parallel
        replicas if they are as fast as this one.
    finished: given each response that this replica generates, as soon as it is finished.
    interrupted: see `Engine.generate`; replicas may answer differently.
    """

    examples: Sequence[Example]
    iteration: int
    num_generations: int = 1
    known: Mapping[Key, Response] = field(default_factory=dict)
    progress: Callable[[str, int], None] | None = None
    finished: Callable[[Response], None] | None = None
    interrupted: Callable[[], bool] | None = None


@dataclass(frozen=True, slots=True)
class RolloutResult:
    """What came of a request, the same on every process.

    responses: those that were generated now, by any replica.
    rollouts: in the order of the examples and of the responses to each; None if generation was interrupted before there
        were all responses.
    """

    responses: dict[Key, Response]
    rollouts: list[Rollout] | None


def roll_out(
    gpt: GPTModel, generator: Engine, request: RolloutRequest, max_new_tokens: int, batching: Batching
) -> RolloutResult:
    """Generate the responses that are not known with the weights that `gpt` has now, then score all of them.

    Every process calls it; data-parallel replicas share the work. All responses are scored together, whoever generated
    them and when: the last bits of a log-probability depend on the sequences that go through the model with it.

    max_new_tokens: the budget of each response, further limited by what its prompt leaves of the context.
    Raises as `Engine.generate` does.
    """
    generated = _generate(generator, request, max_new_tokens)
    responses = {**request.known, **generated}
    keys = [[(example.index, sample) for sample in range(request.num_generations)] for example in request.examples]
    if any(key not in responses for of_example in keys for key in of_example):
        return RolloutResult(generated, None)
    by_example = [[responses[key] for key in of_example] for of_example in keys]
    return RolloutResult(generated, _score(gpt, request, by_example, batching))


def _generate(generator: Engine, request: RolloutRequest, max_new_tokens: int) -> dict[Key, Response]:
    samples = range(request.num_generations)
    incomplete = [e for e in request.examples if any((e.index, sample) not in request.known for sample in samples)]
    requests = [
        GenerationRequest(example.index, example.prompt_ids, max_new_tokens, sample)
        for example in _own_share(incomplete)
        for sample in samples
        if (example.index, sample) not in request.known
    ]
    progress = _phase(request.progress, "generating")
    own = generator.generate(requests, request.iteration, progress, request.finished, request.interrupted)
    return {response.key: response for share in _of_all_replicas(own) for response in share}


def _score(
    gpt: GPTModel, request: RolloutRequest, responses: Sequence[Sequence[Response]], batching: Batching
) -> list[Rollout]:
    """responses: to each example. Its prompt and its human response are computed once for all of them."""
    groups = [
        ResponseGroup(example.prompt_ids, (example.response_ids, *(response.ids for response in of_example)))
        for example, of_example in _own_share(list(zip(request.examples, responses, strict=True)))
    ]
    per_token = group_logps(gpt, groups, batching, _phase(request.progress, "scoring"))
    shares = _of_all_replicas([[float(logps.double().sum()) for logps in of_group] for of_group in per_token])
    logps = [shares[i % len(shares)][i // len(shares)] for i in range(len(responses))]
    return [
        Rollout(response, chosen, rejected)
        for of_example, (chosen, *all_rejected) in zip(responses, logps, strict=True)
        for response, rejected in zip(of_example, all_rejected, strict=True)
    ]


def _own_share(items: Sequence[T]) -> Sequence[T]:
    """Those that this data-parallel replica works on."""
    return items[parallel_state.get_data_parallel_rank() :: parallel_state.get_data_parallel_world_size()]


def _phase(progress: Callable[[str, int], None] | None, name: str) -> Callable[[int], None] | None:
    size = parallel_state.get_data_parallel_world_size()
    return None if progress is None else lambda count: progress(name, count * size)


def _of_all_replicas(own: T) -> list[T]:
    """What each data-parallel replica has, on every process."""
    return gathered(own, parallel_state.get_data_parallel_group())
