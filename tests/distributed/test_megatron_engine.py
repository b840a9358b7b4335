"""megatron-core's dynamic engine: tests of `test_generation.py` over again, and its responses against our engine's."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow.parquet as pq
import pytest
import test_generation
from harness import Workers
from runs import make_checkpoint, make_data, training_run
from test_generation import (  # noqa: F401  collected here too, and run with the fixture `workers` of this file
    FILTERED,
    LLAMA,
    REQUESTS,
    SAMPLED,
    ends_on_rising_pair,
    fail,
    of_one_process,
    requests_of,
    test_budgets_are_per_sample_and_end_at_the_context,
    test_decoding_computes_what_a_whole_pass_computes,
    test_finished_rows_cost_nothing,
    test_greedy_equals_transformers,
    test_no_stop_before_the_minimum_length,
    test_penalty_min_length_and_stops_equal_transformers,
    test_progress_counts_every_response_once,
    test_refusals,
    test_replicas_share_the_work_and_change_nothing,
    test_should_stop_ends_a_response,
    test_the_temperature_is_that_of_the_rules,
    test_training_goes_on_as_if_nothing_had_been_generated,
)
from toy import fill_deterministically

from nemo_spin.errors import UserError
from nemo_spin.generation.cache import round_up
from nemo_spin.generation.interface import Response
from nemo_spin.megatron.gpt import build_gpt


def with_megatrons_engine(function: Callable, *args: Any, **kwargs: Any) -> Any:
    from nemo_spin.generation.megatron_engine import MegatronEngine

    with mock.patch.object(test_generation, "Generator", MegatronEngine):
        return function(*args, **kwargs)


class OverMegatronsEngine:
    """Workers that have megatron-core's engine where a test thinks that it has ours."""

    def __init__(self, workers: Workers) -> None:
        self.over_ours = workers

    def run(self, function: Callable, *args: Any, **kwargs: Any) -> list[Any]:
        return self.over_ours.run(with_megatrons_engine, function, *args, **kwargs)


@pytest.fixture
def workers(workers: Workers) -> OverMegatronsEngine:
    return OverMegatronsEngine(workers)


@pytest.mark.parametrize(
    ("sampling", "options"),
    [
        (replace(SAMPLED, repetition_penalty=1.2), {"stop_ids": frozenset(range(0, 251, 17)), "slots": 3}),
        (FILTERED, {"should_stop": ends_on_rising_pair, "min_length": 4, "slots": 5}),
    ],
    ids=["stop-ids", "end-strings"],
)
def test_the_responses_are_our_engines(workers: OverMegatronsEngine, sampling: Any, options: dict[str, Any]) -> None:
    """In every layout, with more requests than rows at a time, and sequences of one to four pages."""
    requests = requests_of(16) + requests_of(6, budget=50)
    expected = of_one_process(workers.over_ours, LLAMA, sampling, requests, **options)
    assert {response.finish_reason for response in expected} == {"stop", "length"}
    for tp, pp in ((1, 1), (2, 1), (1, 2), (2, 2)):
        for responses, _ in workers.run(test_generation.generate, LLAMA, sampling, requests, tp=tp, pp=pp, **options):
            assert responses == expected


def test_batching_does_not_matter(workers: OverMegatronsEngine) -> None:
    test_generation.test_batching_does_not_matter(workers, FILTERED)


def test_every_response_says_whose_it_is(workers: OverMegatronsEngine) -> None:
    requests = [replace(request, sample=sample) for request in REQUESTS[:3] for sample in range(2)]
    expected = of_one_process(workers.over_ours, LLAMA, SAMPLED, requests)
    assert [(response.index, response.sample) for response in expected] == [(r.index, r.sample) for r in requests]
    assert of_one_process(workers, LLAMA, SAMPLED, requests) == expected


def test_padding_of_the_vocabulary_is_never_sampled(workers: OverMegatronsEngine) -> None:
    test_generation.test_padding_of_the_vocabulary_is_never_sampled(workers, FILTERED)


def with_room_for(rows: float, requests: list[Any]) -> tuple[list[Response], Any]:
    """With a cache that holds so many of the longest rows."""
    from nemo_spin.generation.cache import CacheShape

    model = fill_deterministically(build_gpt(LLAMA, "32"))
    longest = round_up(max(len(request.prompt_ids) + request.max_new_tokens for request in requests))
    gib = (rows * longest + 1) * CacheShape.of(model).bytes_per_token / 2**30
    generator = test_generation.make_generator(model, LLAMA, FILTERED, kv_cache_gib=gib)
    return generator.generate(requests, 0), generator.statistics


@pytest.mark.parametrize("rows", [1, 2.6])
def test_rows_that_the_cache_cannot_hold_are_read_again(workers: OverMegatronsEngine, rows: float) -> None:
    requests = requests_of(8, budget=50)
    expected = of_one_process(workers.over_ours, LLAMA, FILTERED, requests)
    for responses, statistics in workers.run(with_room_for, rows, requests, pp=2):
        assert responses == expected
        assert statistics.preempted_rows > 0


def too_small_a_cache() -> str:
    with pytest.raises(UserError) as refused:
        with_room_for(0.9, requests_of(3, budget=50))
    return str(refused.value)


def test_a_row_that_never_fits_is_refused(workers: OverMegatronsEngine) -> None:
    (says,) = workers.run(too_small_a_cache)
    assert "model.spin.kv_cache_gib" in says


def interrupted_after(steps: int) -> tuple[list[Response], list[Response]]:
    """What was returned, and what was told of meanwhile."""
    model = fill_deterministically(build_gpt(LLAMA, "32"))
    asked = iter(range(1000))
    told: list[Response] = []
    generator = test_generation.make_generator(model, LLAMA, SAMPLED)
    return generator.generate(REQUESTS, 0, None, told.append, lambda: next(asked) == steps), told


def test_an_interruption_returns_what_is_finished(workers: OverMegatronsEngine) -> None:
    expected = of_one_process(workers.over_ours, LLAMA, SAMPLED)
    for responses, told in workers.run(interrupted_after, 20, pp=2):
        assert 0 < len(responses) < len(expected)
        assert responses == [response for response in expected if response in responses]
        assert sorted(told, key=responses.index) == responses


def left_behind(should_stop: Callable[[Sequence[int]], bool] | None) -> list[str]:
    """What a generation changed outside of itself, or keeps."""
    from megatron.core.inference.contexts import dynamic_context
    from megatron.core.inference.engines import dynamic_engine
    from megatron.core.transformer import attention

    model = fill_deterministically(build_gpt(LLAMA, "32"))
    changed = [attention, dynamic_context, dynamic_engine, model.rotary_pos_emb]
    changed += [layer.self_attention for layer in model.decoder.layers]
    before = [dict(vars(owner)) for owner in changed]
    generator = test_generation.make_generator(model, LLAMA, SAMPLED, should_stop=should_stop)
    error = None
    try:
        generator.generate(REQUESTS, 0)
    except RuntimeError as failure:
        error = failure  # with the frames, and what they hold, as while its sentence is written
    assert (error is not None) == (should_stop is not None)
    found = [str(owner)[:60] for owner, names in zip(changed, before, strict=True) if dict(vars(owner)) != names]
    # As the model asks for them, for a sequence as long as the longest was: it would be given again what is remembered.
    longest = max(len(request.prompt_ids) + request.max_new_tokens for request in REQUESTS)
    if model.rotary_pos_emb(longest, packed_seq=False, cp_group=None).is_inference():
        found.append("angles that cannot be trained with")
    for item in gc.get_objects():
        if isinstance(item, dynamic_context.DynamicInferenceContext) and item.memory_buffer is not None:
            found.append("the pages")
    try:
        from megatron.core.inference.utils import InferenceMode
    except ImportError:
        return found
    return [*found, "the inference mode"] if InferenceMode.is_active() else found


@pytest.mark.parametrize("should_stop", [None, fail], ids=["success", "error"])
def test_nothing_is_left_behind(workers: OverMegatronsEngine, should_stop: Any) -> None:
    assert workers.run(left_behind, should_stop) == [[]]


def run_and_count(*args: Any, **settings: Any) -> int:
    """How often a training run has generated with megatron-core's engine."""
    from nemo_spin.generation.megatron_engine import MegatronEngine

    generate = MegatronEngine.generate
    with mock.patch.object(MegatronEngine, "generate", autospec=True, side_effect=generate) as noted:
        training_run(*args, **settings)
    return noted.call_count


def test_a_run_may_change_its_engine(workers: OverMegatronsEngine, tmp_path: Path) -> None:
    """The model is generated with while it is being trained, wrapped for that and with a split sequence."""
    checkpoint, data = workers.over_ours.run(make_checkpoint, str(tmp_path))[0], make_data(str(tmp_path), 9)
    settings = {"trainer.spin.max_epochs": 1, "model.seed": 5, "model.spin.rollout_batch_size": 3}
    settings |= {"model.global_batch_size": 4, "model.sequence_parallel": True}
    tables, counts = [], []
    for engine in ("auto", "megatron"):
        run_dir = tmp_path / engine
        settings["model.spin.generation_engine"] = engine
        counts.append(workers.over_ours.run(run_and_count, checkpoint, data, str(run_dir), tp=2, **settings)[0])
        rollouts = [pq.read_table(run_dir / "rollouts" / f"iteration-{i:03d}").to_pylist() for i in range(2)]
        tables.append([sorted(table, key=lambda row: row["index"]) for table in rollouts])
    assert tables[0] == tables[1]
    assert counts[0] == 0 < counts[1]
