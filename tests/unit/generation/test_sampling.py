"""Filters and penalties against transformers' own classes; draws against the softmax they are drawn from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation import logits_process as theirs

from nemo_spin.config import SamplingParams
from nemo_spin.generation import sampling as ours
from nemo_spin.generation.noise import sample_key
from nemo_spin.generation.rules import Rules
from nemo_spin.generation.sampling import NO_TOKEN, Sampler, SeenTokens

VOCAB = 97
STOP = (3, 50)


def params(**changes: Any) -> SamplingParams:
    plain = {"use_greedy": False, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    return SamplingParams(**{**plain, "end_strings": (), **changes})


def random_logits(rows: int = 16, seed: int = 0, vocab: int = VOCAB) -> Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def histories(rows: int = 16, length: int = 30) -> Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


def seen_in(history: Tensor) -> Tensor:
    return torch.zeros(len(history), VOCAB, dtype=torch.bool).scatter_(1, history, True)


@pytest.mark.parametrize("temperature", [0.3, 1.7])
def test_temperature(temperature: float) -> None:
    expected = theirs.TemperatureLogitsWarper(temperature)(None, random_logits())
    assert torch.equal(ours.divide_by_temperature(random_logits(), temperature), expected)


@pytest.mark.parametrize("k", [1, 5, VOCAB, 1000])
def test_top_k(k: int) -> None:
    logits = random_logits()
    logits[:, :20] = logits[:, :1]  # Ties at the border are kept, all of them.
    expected = theirs.TopKLogitsWarper(k)(None, logits.clone())
    assert torch.equal(ours.keep_top_k(logits, k), expected)


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("k", [0, 7])
def test_top_p(p: float, k: int) -> None:
    expected, logits = random_logits(), random_logits()
    if k:
        expected, logits = theirs.TopKLogitsWarper(k)(None, expected), ours.keep_top_k(logits, k)
    expected = theirs.TopPLogitsWarper(p)(None, expected)
    assert torch.equal(ours.keep_top_p(logits, p), expected)


@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_repetition_penalty(penalty: float) -> None:
    expected = theirs.RepetitionPenaltyLogitsProcessor(penalty)(histories(), random_logits())
    found = ours.penalize_repetition(random_logits(), seen_in(histories()), penalty)
    assert torch.allclose(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("generated", [0, 4, 5, 6])
def test_min_length(generated: int) -> None:
    processor = theirs.MinNewTokensLengthLogitsProcessor(30 - generated, 5, list(STOP))
    rows = torch.full((16,), generated) < 5
    found = ours.ban(random_logits(), rows, torch.tensor(STOP))
    assert torch.equal(found, processor(histories(), random_logits()))


def transformers_scores(logits: Tensor, history: Tensor, generated: int, settings: SamplingParams) -> Tensor:
    """In the order in which transformers' `generate` applies them."""
    scores = theirs.RepetitionPenaltyLogitsProcessor(settings.repetition_penalty)(history, logits.clone())
    scores = theirs.MinNewTokensLengthLogitsProcessor(history.shape[1] - generated, 5, list(STOP))(history, scores)
    if settings.use_greedy:
        return scores
    scores = theirs.TemperatureLogitsWarper(settings.temperature)(history, scores)
    scores = theirs.TopKLogitsWarper(settings.top_k)(history, scores)
    return theirs.TopPLogitsWarper(settings.top_p)(history, scores)


def sampler_of(settings: SamplingParams, vocab: int = VOCAB, **changes: Any) -> Sampler:
    return Sampler(Rules(settings, vocab, max_sequence_length=60, seed=0, **changes))


@pytest.mark.parametrize("generated", [4, 5])
def test_greedy_takes_penalties_but_no_filters(generated: int) -> None:
    settings = params(use_greedy=True, repetition_penalty=1.5, temperature=0.5, top_k=1)
    logits, history = random_logits(200), histories(200)
    logits[:, STOP[0]] += 8
    sampler = sampler_of(settings, min_length=5, stop_ids=frozenset(STOP))
    lengths, sample_keys = torch.full((200,), generated), torch.zeros(200, dtype=torch.int64)
    expected = transformers_scores(logits, history, generated, settings).argmax(dim=-1)
    found = sampler(logits, sample_keys, lengths, seen_in(history))
    assert torch.equal(found, expected)
    assert (found == STOP[0]).any() == (generated >= 5)


def chi_square(tokens: Tensor, probabilities: Tensor) -> tuple[float, int]:
    """The statistic, and its degrees of freedom; tokens expected fewer than five times are pooled."""
    expected = probabilities.double() * len(tokens)
    counts = torch.bincount(tokens, minlength=len(expected)).double()
    assert not counts[expected == 0].any()
    often = expected >= 5
    pooled_expected = torch.cat([expected[often], expected[~often].sum()[None]])
    pooled_counts = torch.cat([counts[often], counts[~often].sum()[None]])
    kept = pooled_expected >= 1
    statistic = ((pooled_counts - pooled_expected) ** 2 / pooled_expected)[kept].sum()
    return float(statistic), int(kept.sum()) - 1


@pytest.mark.parametrize(
    "settings",
    [
        params(),
        params(temperature=0.6),
        params(temperature=1.4, top_k=20, top_p=0.9, repetition_penalty=1.3),
    ],
)
def test_draws_follow_the_softmax_of_transformers_scores(settings: SamplingParams) -> None:
    draws = 20000
    logits, history = random_logits(1) / 2, histories(1)
    filtered = settings if settings.top_k else params(temperature=settings.temperature, top_k=VOCAB)
    scores = transformers_scores(logits, history, 2, filtered)
    sampler = sampler_of(settings, VOCAB + 3, min_length=5, stop_ids=frozenset(STOP))
    # Three real rows that nothing can choose, and padding behind them that would always win.
    wide = torch.cat([logits, torch.full((1, 3), -torch.inf), torch.full((1, 5), 1e4)], dim=-1).repeat(draws, 1)
    sample_keys = torch.tensor([sample_key(1, 0, index) for index in range(draws)])
    seen = torch.nn.functional.pad(seen_in(history), (0, 3)).repeat(draws, 1)
    tokens = sampler(wide, sample_keys, torch.full((draws,), 2), seen)
    statistic, degrees = chi_square(tokens, scores.softmax(dim=-1)[0])
    assert degrees > 5
    assert abs(statistic - degrees) < 4 * (2 * degrees) ** 0.5


def test_bfloat16_logits_are_sampled_in_float32() -> None:
    logits = random_logits(50).to(torch.bfloat16)
    sampler = sampler_of(params(temperature=0.7))
    sample_keys, lengths = torch.arange(50), torch.zeros(50, dtype=torch.int64)
    assert torch.equal(sampler(logits, sample_keys, lengths), sampler(logits.float(), sample_keys, lengths))


@pytest.mark.parametrize("greedy", [False, True])
def test_rows_without_a_valid_token_are_marked(greedy: bool) -> None:
    logits = random_logits(4)
    logits[1, 5], logits[2] = torch.nan, -torch.inf
    sampler = sampler_of(params(use_greedy=greedy))
    found = sampler(logits, torch.arange(4), torch.zeros(4, dtype=torch.int64))
    assert (found == NO_TOKEN).tolist() == [False, True, True, False]


def test_seen_tokens_follow_their_rows() -> None:
    seen = SeenTokens(4, 10)
    seen.admit(0, [(1, 2, 2), (3,), (4,)])
    seen.add(0, torch.tensor([7, 8, 9]))
    seen.move(torch.tensor([2]), torch.tensor([0]))
    seen.admit(2, [(5, 6)])
    assert [row.nonzero().flatten().tolist() for row in seen.mask] == [[4, 9], [3, 8], [5, 6], []]
