"""Generation against transformers, and against itself: the same responses in every layout and in every batching."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from harness import Workers
from megatron.core import parallel_state
from toy import fill_deterministically, gpt2_architecture, to_transformers, toy_architecture

from nemo_spin.config import SamplingParams
from nemo_spin.errors import DataError, UserError
from nemo_spin.generation.cache import round_up
from nemo_spin.generation.engine import Generator
from nemo_spin.generation.interface import GenerationRequest, Response
from nemo_spin.generation.rules import Rules
from nemo_spin.megatron.architecture import Architecture
from nemo_spin.megatron.gpt import build_gpt

LLAMA, GPT2 = toy_architecture(), gpt2_architecture()
PLAIN: dict[str, Any] = {
    "use_greedy": False,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "end_strings": (),
}
GREEDY = SamplingParams(**PLAIN | {"use_greedy": True})
SAMPLED = SamplingParams(**PLAIN)
FILTERED = SamplingParams(**PLAIN | {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.2})


def requests_of(count: int = 10, budget: int | None = None) -> list[GenerationRequest]:
    """Prompts of 1 to 21 tokens and, unless given, budgets of 1 to 40: the context of 96 is never reached."""
    choice = random.Random(0)
    return [
        GenerationRequest(
            index=100 + i,
            prompt_ids=tuple(choice.randrange(1, 240) for _ in range(choice.choice((1, 2, 5, 5, 13, 21)))),
            max_new_tokens=budget or choice.choice((1, 7, 20, 40)),
        )
        for i in range(count)
    ]


REQUESTS = requests_of()


def make_generator(
    model: Any,
    architecture: Architecture,
    sampling: SamplingParams,
    slots: int | None = 4,
    kv_cache_gib: float | None = None,
    seed: int = 17,
    **changes: Any,
) -> Generator:
    """changes: of the rules."""
    rules = Rules(sampling, architecture.vocab_size, architecture.max_sequence_length, seed, **changes)
    return Generator(model, rules, slots, kv_cache_gib)


def generate(
    architecture: Architecture,
    sampling: SamplingParams,
    requests: Sequence[GenerationRequest] = REQUESTS,
    iteration: int = 0,
    precision: str = "32",
    **options: Any,
) -> tuple[list[Response], Any]:
    """On every rank: the responses, and what they cost."""
    model = fill_deterministically(build_gpt(architecture, precision))
    generator = make_generator(model, architecture, sampling, **options)
    return generator.generate(requests, iteration), generator.statistics


def of_one_process(workers: Workers, *args: Any, **options: Any) -> list[Response]:
    ((responses, _),) = workers.run(generate, *args, **options)
    return responses


def against_transformers(architecture: Architecture, changes: dict[str, Any], stop_ids: tuple[int, ...]) -> None:
    model = fill_deterministically(build_gpt(architecture, "32"))
    settings = replace(GREEDY, repetition_penalty=changes.get("repetition_penalty", 1.0))
    min_length = changes.get("min_new_tokens", 0)
    generator = make_generator(model, architecture, settings, min_length=min_length, stop_ids=frozenset(stop_ids))
    theirs = to_transformers(architecture, model)
    for request, response in zip(REQUESTS, generator.generate(REQUESTS, 0), strict=True):
        prompt = torch.tensor([request.prompt_ids])
        expected = theirs.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=request.max_new_tokens,
            do_sample=False,
            eos_token_id=list(stop_ids) or None,
            **changes,
        )[0, prompt.shape[1] :].tolist()
        assert list(response.ids) == expected
        assert response.finish_reason == ("stop" if expected[-1] in stop_ids else "length")


@pytest.mark.parametrize("name", ["llama", "tied", "wide-heads", "gpt2"])
def test_greedy_equals_transformers(workers: Workers, name: str) -> None:
    architecture = {
        "llama": LLAMA,
        "tied": toy_architecture(share_embeddings_and_output_weights=True, num_query_groups=1),
        "wide-heads": toy_architecture(kv_channels=16, rotary_base=500.0, num_query_groups=4),
        "gpt2": GPT2,
    }[name]
    workers.run(against_transformers, architecture, {}, ())


def test_penalty_min_length_and_stops_equal_transformers(workers: Workers) -> None:
    changes = {"repetition_penalty": 1.4, "min_new_tokens": 6}
    workers.run(against_transformers, LLAMA, changes, tuple(range(0, 251, 12)))


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, FILTERED], ids=["greedy", "sampled", "filtered"])
@pytest.mark.parametrize("architecture", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_every_layout_generates_the_same(workers: Workers, architecture: Architecture, sampling: Any) -> None:
    expected = of_one_process(workers, architecture, sampling)
    for tp, pp in ((2, 1), (1, 2), (2, 2), (1, 4)):
        for responses, _ in workers.run(generate, architecture, sampling, tp=tp, pp=pp):
            assert responses == expected


def share(architecture: Architecture, sampling: SamplingParams) -> tuple[int, list[Response]]:
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    # Replicas have different amounts of work: nothing may wait for the other.
    return rank, generate(architecture, sampling, REQUESTS[rank::size] + REQUESTS[:rank])[0]


def test_replicas_share_the_work_and_change_nothing(workers: Workers) -> None:
    expected = of_one_process(workers, LLAMA, SAMPLED)
    for rank, responses in workers.run(share, LLAMA, SAMPLED, tp=2, dp=2):
        assert responses == expected[rank::2] + expected[:rank]


@pytest.mark.parametrize("sampling", [GREEDY, FILTERED], ids=["greedy", "filtered"])
def test_batching_does_not_matter(workers: Workers, sampling: Any) -> None:
    expected = {response.index: response for response in of_one_process(workers, LLAMA, sampling, slots=4)}
    for slots in (1, 3, 8, 100):
        for requests in (REQUESTS, REQUESTS[::-1], REQUESTS[3:6]):
            responses = of_one_process(workers, LLAMA, sampling, requests, slots=slots)
            assert responses == [expected[request.index] for request in requests]


def test_responses_depend_on_sample_iteration_and_seed(workers: Workers) -> None:
    same_prompt = [GenerationRequest(index, (5, 6, 7), 20) for index in (0, 1, 2, 1)]
    base = of_one_process(workers, LLAMA, SAMPLED, same_prompt)
    assert base[1] == base[3]
    next_iteration = of_one_process(workers, LLAMA, SAMPLED, same_prompt, iteration=1)
    other_seed = of_one_process(workers, LLAMA, SAMPLED, same_prompt, seed=18)
    streams = {tuple(response.ids) for responses in (base, next_iteration, other_seed) for response in responses}
    assert len(streams) == 9


def at_temperatures(*temperatures: float) -> list[list[Response]]:
    """The responses of one model at each temperature in turn; the rules of no other iteration are left over."""
    model = fill_deterministically(build_gpt(LLAMA, "32"))
    rules = [make_generator(model, LLAMA, SAMPLED).rules]
    rules += [replace(rules[0], sampling=replace(SAMPLED, temperature=temperature)) for temperature in temperatures[1:]]
    assert [one.settings for one in rules] == [rules[0].settings | {"temperature": value} for value in temperatures]
    return [Generator(model, one, 4).generate(REQUESTS, 0) for one in rules]


def test_the_temperature_is_that_of_the_rules(workers: Workers) -> None:
    plain, hot = (of_one_process(workers, LLAMA, replace(SAMPLED, temperature=value)) for value in (1.0, 1.7))
    assert plain != hot
    for responses in workers.run(at_temperatures, 1.0, 1.7, 1.0, tp=2, pp=2):
        assert responses == [plain, hot, plain]


def first_tokens_against_softmax() -> tuple[float, int]:
    """Chi-square of the first tokens of many samples of one prompt, and its degrees of freedom."""
    draws, temperature = 6000, 0.8
    model = fill_deterministically(build_gpt(LLAMA, "32"))
    generator = make_generator(model, LLAMA, replace(SAMPLED, temperature=temperature), slots=3000)
    prompt = (5, 6, 7)
    responses = generator.generate([GenerationRequest(index, prompt, 1) for index in range(draws)], 0)
    logits = model(torch.tensor([prompt]), torch.arange(3)[None], None)[0, -1].detach()
    expected = (logits / temperature).softmax(dim=-1).double() * draws
    counts = torch.bincount(torch.tensor([response.ids[0] for response in responses]), minlength=len(expected))
    often = expected >= 5
    statistic = ((counts - expected) ** 2 / expected)[often].sum()
    rest = expected[~often].sum()
    return float(statistic + (counts[~often].sum() - rest) ** 2 / rest), int(often.sum())


def test_samples_follow_the_models_distribution(workers: Workers) -> None:
    ((statistic, degrees),) = workers.run(first_tokens_against_softmax)
    assert degrees > 10
    assert abs(statistic - degrees) < 4 * (2 * degrees) ** 0.5


def test_a_stop_id_ends_a_response_and_belongs_to_it(workers: Workers) -> None:
    stop_ids = frozenset(range(0, 251, 17))
    requests = requests_of(budget=30)
    free = of_one_process(workers, LLAMA, SAMPLED, requests)
    reasons = set()
    for response, whole in zip(of_one_process(workers, LLAMA, SAMPLED, requests, stop_ids=stop_ids), free, strict=True):
        stops = [place for place, token in enumerate(whole.ids) if token in stop_ids]
        assert response.ids == (whole.ids[: stops[0] + 1] if stops else whole.ids)
        assert response.finish_reason == ("stop" if stops else "length")
        reasons.add(response.finish_reason)
    assert reasons == {"stop", "length"}


def test_no_stop_before_the_minimum_length(workers: Workers) -> None:
    stop_ids = frozenset(range(0, 251, 3))
    responses = of_one_process(workers, LLAMA, SAMPLED, requests_of(budget=40), stop_ids=stop_ids, min_length=8)
    for response in responses:
        assert not stop_ids & set(response.ids[:8])
        assert len(response.ids) > 8
    assert {response.finish_reason for response in responses} == {"stop"}


def ends_on_rising_pair(ids: Sequence[int]) -> bool:
    return len(ids) > 1 and ids[-1] > ids[-2] + 100


def test_should_stop_ends_a_response(workers: Workers) -> None:
    requests = requests_of(budget=30)
    free = of_one_process(workers, LLAMA, SAMPLED, requests)
    expected = []
    for whole in free:
        ends = [n for n in range(4, 31) if ends_on_rising_pair(whole.ids[:n])]
        assert ends
        expected.append(Response(whole.index, whole.ids[: ends[0]], "stop"))
    for responses, _ in workers.run(
        generate, LLAMA, SAMPLED, requests, tp=2, pp=2, should_stop=ends_on_rising_pair, min_length=4
    ):
        assert responses == expected


def test_budgets_are_per_sample_and_end_at_the_context(workers: Workers) -> None:
    requests = [GenerationRequest(0, (1,) * 90, 40), GenerationRequest(1, (1,) * 95, 40), GenerationRequest(2, (1,), 9)]
    responses = of_one_process(workers, GPT2, GREEDY, requests)
    assert [len(response.ids) for response in responses] == [6, 1, 9]
    assert {response.finish_reason for response in responses} == {"length"}


def with_loud_padding(sampling: SamplingParams) -> list[Response]:
    architecture = replace(LLAMA, vocab_size=240)
    model = fill_deterministically(build_gpt(architecture, "32"))
    if model.post_process:
        tp_rank, rows = parallel_state.get_tensor_model_parallel_rank(), len(model.output_layer.weight)
        padding = slice(max(0, 240 - tp_rank * rows), rows)
        loud = 50 * torch.randn(1, LLAMA.transformer["hidden_size"], generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            # One sign or the other makes their logits the largest by far.
            model.output_layer.weight[padding] = loud
            model.output_layer.weight[padding][::2] *= -1
    return make_generator(model, architecture, sampling).generate(REQUESTS, 0)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, FILTERED], ids=["greedy", "sampled", "filtered"])
def test_padding_of_the_vocabulary_is_never_sampled(workers: Workers, sampling: Any) -> None:
    expected = of_one_process(workers, replace(LLAMA, vocab_size=240), sampling)
    assert max(max(response.ids) for response in of_one_process(workers, LLAMA, SAMPLED)) >= 240
    for tp in (1, 2):
        for responses in workers.run(with_loud_padding, sampling, tp=tp):
            assert responses == expected


def test_finished_rows_cost_nothing(workers: Workers) -> None:
    requests = requests_of(64)
    ((responses, statistics),) = workers.run(generate, LLAMA, SAMPLED, requests, slots=16)
    tokens = sum(len(response.ids) for response in responses)
    assert statistics.generated_tokens == tokens
    # The first token of each response comes out of the pass over its prompt; every other one is one row in one pass.
    assert statistics.row_steps == tokens - len(requests)
    assert statistics.row_steps > 0.6 * 16 * statistics.decode_steps
    assert statistics.prefills < len(requests) / 2


def flags(model: Any) -> list[Any]:
    state = [(module.training, getattr(module, "sequence_parallel", None)) for module in model.modules()]
    for module in model.modules():
        config = getattr(module, "config", None)
        state.append((type(module).__name__, config is not None and config.sequence_parallel))
    if model.pre_process:
        state.append(model.embedding.reduce_scatter_embeddings)
        state.append(model.embedding.word_embeddings.reduce_scatter_embeddings)
    return state


def gradients(model: Any) -> list[torch.Tensor]:
    model.zero_grad()
    ids = torch.arange(48).reshape(2, 24)
    model(ids, torch.arange(24).expand_as(ids), None).float().square().mean().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def fail(ids: Sequence[int]) -> bool:
    if len(ids) > 3:
        raise RuntimeError("stop it")
    return False


def training_goes_on() -> list[Response]:
    """Generate first, so that nothing that generation left behind goes unnoticed; fail once in between."""
    model = fill_deterministically(build_gpt(LLAMA, "32", sequence_parallel=True))
    model.train()
    model.decoder.layers[1].eval()
    before, modules = flags(model), list(model.modules())
    inside: set[tuple[bool, bool]] = set()

    def watch(ids: Sequence[int]) -> bool:
        inside.add((any(module.training for module in modules), torch.is_grad_enabled()))
        return False

    responses = make_generator(model, LLAMA, SAMPLED, should_stop=watch).generate(REQUESTS, 0)
    assert inside == {(False, False)}
    assert flags(model) == before
    assert list(model.modules()) == modules
    # megatron-core keeps the angles that it was asked for, and autograd cannot save an inference tensor.
    longest = max(len(request.prompt_ids) + request.max_new_tokens for request in REQUESTS)
    assert not any(model.rotary_pos_emb(length).is_inference() for length in (longest, round_up(longest)))
    first = gradients(model)
    with pytest.raises(RuntimeError, match="stop it"):
        make_generator(model, LLAMA, SAMPLED, should_stop=fail).generate(REQUESTS, 0)
    assert flags(model) == before
    assert list(model.modules()) == modules
    untouched = fill_deterministically(build_gpt(LLAMA, "32", sequence_parallel=True))
    for one, again, expected in zip(first, gradients(model), gradients(untouched), strict=True):
        assert torch.equal(one, expected)
        assert torch.equal(again, expected)
    return responses


@pytest.mark.parametrize("tp", [1, 2])
def test_training_goes_on_as_if_nothing_had_been_generated(workers: Workers, tp: int) -> None:
    expected = of_one_process(workers, LLAMA, SAMPLED)
    for responses in workers.run(training_goes_on, tp=tp):
        assert responses == expected


def refusals() -> list[str]:
    model = fill_deterministically(build_gpt(LLAMA, "32"))
    generator = make_generator(model, LLAMA, SAMPLED)
    with pytest.raises(DataError) as too_long:
        generator.generate([GenerationRequest(7, (1,) * 96, 5)], 0)
    with torch.no_grad():
        next(model.decoder.parameters())[0] = torch.nan
    with pytest.raises(UserError) as not_finite:
        generator.generate(REQUESTS, 0)
    return [str(too_long.value), str(not_finite.value)]


def test_refusals(workers: Workers) -> None:
    for too_long, not_finite in workers.run(refusals, tp=2, pp=2):
        assert "Sample 7" in too_long
        assert "96" in too_long
        assert "not finite" in not_finite


def below_best(architecture: Architecture, precision: str) -> float:
    """How far the scores of greedy tokens fall below the best ones of a pass over the whole sequence, at most."""
    model = fill_deterministically(build_gpt(architecture, precision))
    responses = make_generator(model, architecture, GREEDY).generate(REQUESTS, 0)
    worst = 0.0
    for request, response in zip(REQUESTS, responses, strict=True):
        ids = torch.tensor([[*request.prompt_ids, *response.ids[:-1]]])
        logits = model(ids, torch.arange(ids.shape[1])[None], None)[0, len(request.prompt_ids) - 1 :].float()
        chosen = logits.gather(1, torch.tensor(response.ids.tolist())[:, None])[:, 0]
        worst = max(worst, float((logits.max(dim=-1).values - chosen).max()))
    return worst


@pytest.mark.parametrize(
    ("changes", "precision", "tolerance"),
    [
        ({"softmax_scale": 1.1, "rotary_percent": 0.5}, "32", 1e-4),
        ({"qk_layernorm": True, "rotary_interleaved": True, "rope_scaling": True}, "32", 1e-4),
        ({"position_embedding_type": "none", "add_qkv_bias": True}, "32", 1e-4),
        # Logits reach 10 here, where bfloat16 has steps of 1/16.
        ({}, "bf16", 0.3),
    ],
)
def test_decoding_computes_what_a_whole_pass_computes(
    workers: Workers, changes: dict[str, Any], precision: str, tolerance: float
) -> None:
    assert max(workers.run(below_best, toy_architecture(**changes), precision)) < tolerance


def told_progress() -> tuple[int, int]:
    model = fill_deterministically(build_gpt(LLAMA, "32"))
    told: list[int] = []
    make_generator(model, LLAMA, SAMPLED).generate(REQUESTS, 0, told.append)
    return sum(told), min(told)


def test_progress_counts_every_response_once(workers: Workers) -> None:
    for total, least in workers.run(told_progress, pp=2):
        assert total == len(REQUESTS)
        assert least > 0
