"""Several responses to one prompt: it is computed once, and they are what they would be had it been for each."""

from __future__ import annotations

from dataclasses import replace

import pytest
from harness import Workers
from megatron.core import parallel_state
from test_generation import FILTERED, LLAMA, generate, make_generator, requests_of
from toy import fill_deterministically

from nemo_spin.generation.cache_limit import GIB
from nemo_spin.generation.interface import GenerationRequest, Response
from nemo_spin.megatron.gpt import build_gpt

LONG = replace(LLAMA, max_sequence_length=512)
# Keys and values in fp32 of 2 heads of 8 numbers in 4 layers.
PER_TOKEN = 2 * 4 * 2 * 8 * 4
SAMPLES = 4


def several(prompts: int, budget: int | None = None) -> list[GenerationRequest]:
    return [replace(r, sample=sample) for r in requests_of(prompts, budget) for sample in range(SAMPLES)]


REQUESTS = several(6)


def one_by_one(requests: list[GenerationRequest]) -> list[Response]:
    model = fill_deterministically(build_gpt(LONG, "32"))
    generator = make_generator(model, LONG, FILTERED)
    return [response for request in requests for response in generator.generate([request], 0)]


@pytest.fixture(scope="module")
def expected(workers: Workers) -> list[Response]:
    (responses,) = workers.run(one_by_one, REQUESTS)
    assert [(r.index, r.sample) for r in responses] == [(q.index, q.sample) for q in REQUESTS]
    longest = max(len(r.ids) for r in responses)
    assert len({tuple(r.ids) for r in responses if len(r.ids) == longest}) >= SAMPLES
    return responses


@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"pp": 2}, {"tp": 2, "pp": 2}], ids=str)
def test_responses_are_those_of_prompts_read_one_by_one(
    workers: Workers, layout: dict[str, int], expected: list[Response]
) -> None:
    for slots in (3, 64):  # fewer than there are samples, and more than there are requests
        for responses, statistics in workers.run(generate, LONG, FILTERED, REQUESTS, slots=slots, **layout):
            assert responses == expected
            read, prompts = statistics.prefill_tokens - statistics.prefill_padding, REQUESTS[::SAMPLES]
            whole = sum(len(request.prompt_ids) for request in prompts)
            assert read < SAMPLES * whole
            if not layout and slots == 64:
                assert read == whole


def share(requests: list[GenerationRequest]) -> tuple[int, list[Response]]:
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    return rank, generate(LONG, FILTERED, requests[rank::size])[0]


def test_replicas_share_what_they_have(workers: Workers, expected: list[Response]) -> None:
    for rank, responses in workers.run(share, REQUESTS, dp=2):
        assert responses == expected[rank::2]


def test_the_order_of_requests_does_not_matter(workers: Workers, expected: list[Response]) -> None:
    mixed = [i for first in range(SAMPLES) for i in range(first, len(REQUESTS), SAMPLES)]
    ((responses, statistics),) = workers.run(generate, LONG, FILTERED, [REQUESTS[i] for i in mixed], slots=64)
    assert responses == [expected[i] for i in mixed]
    read = statistics.prefill_tokens - statistics.prefill_padding
    assert read == sum(len(request.prompt_ids) for request in REQUESTS[::SAMPLES])


@pytest.mark.parametrize("layout", [{}, {"tp": 2, "pp": 2}], ids=str)
def test_rows_that_give_way_get_the_same_tokens(workers: Workers, layout: dict[str, int]) -> None:
    requests = several(3, budget=110)
    (expected,) = workers.run(one_by_one, requests)
    limit = 3 * 208 * PER_TOKEN // (layout.get("tp", 1) * layout.get("pp", 1))
    for responses, statistics in workers.run(
        generate, LONG, FILTERED, requests, slots=8, kv_cache_gib=limit / GIB, **layout
    ):
        assert responses == expected
        assert statistics.preempted_rows > 0
        assert statistics.peak_cache_bytes <= limit


def test_a_prompt_of_its_own_is_computed_as_ever(workers: Workers) -> None:
    prompt = tuple(range(1, 14))
    for requests, tokens in (
        ([GenerationRequest(0, prompt, 5, sample) for sample in range(SAMPLES)], 13),
        ([GenerationRequest(i, (i, *prompt[1:]), 5) for i in range(SAMPLES)], SAMPLES * 13),
    ):
        ((_, statistics),) = workers.run(generate, LONG, FILTERED, requests)
        assert (statistics.prefills, statistics.prefill_tokens, statistics.prefill_padding) == (1, tokens, 0)
        assert statistics.generated_tokens == SAMPLES * 5
