"""Several groups of rows in flight, a cache that is too small, a vocabulary in parts: the same tokens, and no waste."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from harness import Workers
from megatron.core import parallel_state
from test_generation import FILTERED, GREEDY, LLAMA, SAMPLED, generate, make_generator, of_one_process, requests_of
from toy import fill_deterministically

from nemo_spin.config import SamplingParams
from nemo_spin.errors import UserError
from nemo_spin.generation.cache_limit import GIB
from nemo_spin.generation.rules import Rules
from nemo_spin.generation.sampling import NO_TOKEN, Sampler, SeenTokens
from nemo_spin.generation.stages import Stage, Underway
from nemo_spin.generation.vocabulary import VocabularyShard
from nemo_spin.megatron.gpt import build_gpt

REQUESTS = requests_of(24)

# ------------------------------------------------------------------------------------------ the pipeline


def passes_and_waits(requests: int) -> tuple[int, list[int], list[int]]:
    """This rank's stage, the rows of each of its passes, and the newest pass whose tokens it had waited for."""
    stage = parallel_state.get_pipeline_model_parallel_rank()
    rows: list[int] = []
    waited: list[int] = []
    newest = -1
    forward, share, wait = Stage.forward, Stage.share, Underway.wait
    number: dict[int, int] = {}

    def noted_forward(self: Stage, tokens: Any, *args: Any) -> Any:
        rows.append(len(tokens))
        waited.append(newest)
        return forward(self, tokens, *args)

    def noted_share(self: Stage, *args: Any) -> Underway:
        underway = share(self, *args)
        number[id(underway)] = len(rows) - 1
        return underway

    def noted_wait(self: Underway) -> Any:
        nonlocal newest
        newest = max(newest, number[id(self)])
        return wait(self)

    with (
        mock.patch.object(Stage, "forward", noted_forward),
        mock.patch.object(Stage, "share", noted_share),
        mock.patch.object(Underway, "wait", noted_wait),
    ):
        generate(LLAMA, SAMPLED, requests_of(requests, budget=20), slots=4)
    return stage, rows, waited


def idle_passes(stages: int, waited: list[int]) -> list[int]:
    """How many passes' time each stage does nothing after its first pass, if every pass takes every stage as long."""
    end = [[0] * len(waited) for _ in range(stages)]
    for number, newest in enumerate(waited):
        for stage in range(stages):
            before = [end[stage][number - 1]] if number else []
            before += [end[stage - 1][number]] if stage else []
            # The last stage has the tokens itself.
            before += [end[-1][newest]] if newest >= 0 and stage < stages - 1 else []
            end[stage][number] = max(before, default=0) + 1
    return [end[stage][-1] - stage - len(waited) for stage in range(stages)]


@pytest.mark.parametrize("stages", [2, 4])
def test_no_stage_waits_for_tokens(workers: Workers, stages: int) -> None:
    # Two for every slot, all equally long: as at the beginning of an iteration, there is always something to do.
    found = workers.run(passes_and_waits, 2 * 4 * (stages + 1), pp=stages)
    _, rows, waited = found[0]
    # Every stage makes the same passes, in the same order.
    assert all(other[1:] == (rows, waited) for other in found)
    assert len(rows) > 5 * stages
    assert idle_passes(stages, waited) == [0] * stages


def generate_again(interrupted_after: int | None, fails_after: int | None) -> tuple[Any, Any]:
    """Leave off in the midst, or fail, and generate again."""
    model = fill_deterministically(build_gpt(LLAMA, "32"))
    asked, tokens = 0, 0

    def interrupted() -> bool:
        nonlocal asked
        asked += 1
        return asked == interrupted_after

    def fail(ids: Any) -> bool:
        nonlocal tokens
        tokens += 1
        if tokens == fails_after:
            raise UserError("enough")
        return False

    first = None
    try:
        first = make_generator(model, LLAMA, SAMPLED, should_stop=fail).generate(REQUESTS, 0, interrupted=interrupted)
    except UserError:
        assert fails_after is not None
    return first, make_generator(model, LLAMA, SAMPLED).generate(REQUESTS, 0)


@pytest.mark.parametrize(("interrupted_after", "fails_after"), [(9, None), (None, 50)], ids=["interrupted", "failed"])
def test_what_was_in_flight_disturbs_nothing_later(
    workers: Workers, interrupted_after: int | None, fails_after: int | None
) -> None:
    expected = of_one_process(workers, LLAMA, SAMPLED, REQUESTS)
    for first, again in workers.run(generate_again, interrupted_after, fails_after, tp=2, pp=2):
        assert again == expected
        if interrupted_after is not None:
            assert 0 < len(first) < len(expected)
            assert all(response in expected for response in first)


# ------------------------------------------------------------------------------------------ the cache


LONG = replace(LLAMA, max_sequence_length=512)
# Keys and values in fp32 of 2 heads of 8 numbers in 4 layers.
PER_TOKEN = 2 * 4 * 2 * 8 * 4


@pytest.mark.parametrize("layout", [{}, {"pp": 2}, {"tp": 2, "pp": 2}], ids=str)
def test_rows_that_give_way_get_the_same_tokens(workers: Workers, layout: dict[str, int]) -> None:
    requests = requests_of(12, budget=110)
    expected = of_one_process(workers, LONG, FILTERED, requests, slots=8)
    # For two rows in each of three groups, or six in one, but not up to their end.
    limit = 3 * 208 * PER_TOKEN // (layout.get("tp", 1) * layout.get("pp", 1))
    for responses, statistics in workers.run(
        generate, LONG, FILTERED, requests, slots=8, kv_cache_gib=limit / GIB, **layout
    ):
        assert responses == expected
        assert statistics.preempted_rows > 0
        # Prompts, and what had been there of the responses.
        assert statistics.prefill_tokens - statistics.prefill_padding > sum(len(r.prompt_ids) for r in requests)
        assert 0 < statistics.peak_cache_bytes <= limit
        assert statistics.generated_tokens == 12 * 110


def too_small() -> str:
    with pytest.raises(UserError) as refused:
        generate(LLAMA, SAMPLED, requests_of(3, budget=60), kv_cache_gib=1e-6)
    return str(refused.value)


def test_a_cache_that_cannot_hold_one_row_is_refused(workers: Workers) -> None:
    for sentence in workers.run(too_small, pp=2):
        assert "sequence of 73 tokens" in sentence
        assert "model.spin.kv_cache_gib" in sentence


def test_the_cache_is_as_large_as_the_rows_in_it(workers: Workers) -> None:
    requests, stop_ids = requests_of(24, budget=400), frozenset(range(0, 251, 4))
    ((responses, statistics),) = workers.run(generate, LONG, SAMPLED, requests, slots=None, stop_ids=stop_ids)
    longest = max(len(q.prompt_ids) + len(r.ids) for q, r in zip(requests, responses, strict=True))
    # A row has room to grow, and not for the 421 tokens that it might come to.
    assert 24 * longest * PER_TOKEN < statistics.peak_cache_bytes < 24 * (longest + 100) * PER_TOKEN


# ------------------------------------------------------------------------------------------ the vocabulary

PADDED_ROWS, VOCABULARY = 64, 120


def of_parts(sampling: SamplingParams, stop_ids: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """Tokens sampled by this rank with the others, each having a part of the logits, and by it alone with all."""
    generator = torch.Generator().manual_seed(0)
    parts = parallel_state.get_tensor_model_parallel_world_size()
    logits = 3 * torch.randn(40, parts * PADDED_ROWS, generator=generator)
    logits[:, VOCABULARY:] = 1e4
    logits[0, :100], logits[1, 40:] = 7.0, 7.0  # ties within and between parts
    logits[2, 70], logits[3, :VOCABULARY], logits[4, 119] = torch.nan, -torch.inf, torch.inf
    keys, lengths = torch.arange(40) * 12345, torch.arange(40) % 7
    history = torch.randint(0, VOCABULARY, (40, 30), generator=generator).tolist()
    shard = VocabularyShard(PADDED_ROWS, VOCABULARY)
    own = slice(shard.start, shard.start + PADDED_ROWS)
    rules = Rules(sampling, VOCABULARY, 30, seed=0, min_length=3, stop_ids=frozenset(stop_ids))
    found = []
    for part, part_of_logits in ((shard, logits[:, own]), (None, logits)):
        sampler = Sampler(rules, shard=part)
        seen = SeenTokens(40, sampler.columns, start=sampler.start)
        seen.admit(0, [ids[:20] for ids in history])
        for ids in zip(*(ids[20:] for ids in history), strict=True):
            seen.add(0, torch.tensor(ids))
        found.append(sampler(part_of_logits.clone(), keys, lengths, seen.mask).tolist())
    return found[0], found[1]


@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        SAMPLED,
        replace(GREEDY, repetition_penalty=1.4),
        replace(SAMPLED, temperature=0.7),
        replace(SAMPLED, top_k=1),
        replace(SAMPLED, top_k=5),
        replace(SAMPLED, top_k=1000),
        replace(SAMPLED, top_p=0.5),
        FILTERED,
    ],
    ids="greedy sampled greedy-penalty temperature top-1 top-5 top-all top-p filtered".split(),
)
def test_parts_of_the_vocabulary_agree_on_what_the_whole_gives(workers: Workers, sampling: Any) -> None:
    # With four ranks the last one has nothing but padding.
    for size in (2, 4):
        for in_parts, whole in workers.run(of_parts, sampling, tuple(range(0, VOCABULARY, 9)), tp=size):
            assert in_parts == whole
            assert whole[2] == whole[3] == NO_TOKEN
            assert len(set(whole)) > 10
            assert max(whole) < VOCABULARY
