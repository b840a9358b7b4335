"""The noise is what it says: a fixed function, uniform, and independent along each of the five numbers it hashes."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from nemo_spin.generation.noise import gumbel, sample_key, token_keys, vocabulary_codes

MASK = (1 << 64) - 1
PINNED_KEY = -2767764141224576924
# Two samples (0, 1) x two positions (0, 1) x three vocabulary ids, of seed 1234 and iteration 1.
PINNED = [
    [0.8914981, -0.2173713, 3.0948865],
    [-0.8687889, 0.0218898, 0.1342940],
    [0.5569577, 0.8151625, 1.5090321],
    [0.1055578, 2.1196995, 0.5925580],
]


def splitmix64(state: int, count: int) -> list[int]:
    """The reference generator of Steele, Lea and Flood, on Python's integers."""
    out = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        out.append(z ^ (z >> 31))
    return out


def keys(samples: int, positions: int, seed: int = 0, iteration: int = 0) -> Tensor:
    """[samples * positions], samples outermost."""
    of_samples = torch.tensor([sample_key(seed, iteration, index) for index in range(samples)])
    return token_keys(of_samples.repeat_interleave(positions), torch.arange(positions).repeat(samples))


def uniform(noise: Tensor) -> Tensor:
    return torch.exp(-torch.exp(-noise.double()))


def test_token_keys_are_the_splitmix64_stream_of_their_sample() -> None:
    for seed, iteration, index in ((0, 0, 0), (1234, 2, 77), (-1, 0, 10**9)):
        key = sample_key(seed, iteration, index)
        found = token_keys(torch.full((50,), key), torch.arange(50))
        assert [value & MASK for value in found.tolist()] == splitmix64(key & MASK, 50)


def test_sample_0_has_the_key_of_training_and_no_two_samples_share_one() -> None:
    numbers = itertools.product((0, 1, 1234), range(4), (*range(40), 10**6), range(12))
    found = {(seed, t, i, sample): sample_key(seed, t, i, sample) for seed, t, i, sample in numbers}
    assert len(set(found.values())) == len(found)
    assert all(key == sample_key(*numbers[:3]) for numbers, key in found.items() if not numbers[3])
    # pinned: a change would mix what an interrupted run has made with what it goes on to make
    assert sample_key(1234, 1, 7, 2) == PINNED_KEY


def test_noise_of_one_prompts_samples_is_uncorrelated() -> None:
    of_samples = torch.tensor([sample_key(0, 0, 5, sample) for sample in range(60)])
    u = uniform(gumbel(token_keys(of_samples, torch.zeros(60, dtype=torch.int64)), vocabulary_codes(0, 4096)))
    for lag in (1, 2, 16):
        a, b = u[:-lag].flatten(), u[lag:].flatten()
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 4.5 / len(a) ** 0.5


def test_noise_is_pinned() -> None:
    """A change of the function would change every run that is resumed: it has to be meant."""
    noise = gumbel(keys(2, 2, seed=1234, iteration=1), vocabulary_codes(0, 3))
    expected = torch.tensor(PINNED)
    assert torch.allclose(noise, expected, rtol=1e-5, atol=1e-5)


def test_a_part_of_the_vocabulary_gets_the_noise_it_has_in_the_whole() -> None:
    some_keys = keys(3, 4)
    whole = gumbel(some_keys, vocabulary_codes(0, 1000))
    part = gumbel(some_keys[5:7], vocabulary_codes(300, 700))
    assert torch.equal(part, whole[5:7, 300:700])


def test_every_number_matters() -> None:
    codes = vocabulary_codes(0, 64)
    base = (7, 3, 11)
    streams = [gumbel(token_keys(torch.tensor([sample_key(*base)]), torch.tensor([5])), codes)]
    for which in range(3):
        changed = tuple(value + (place == which) for place, value in enumerate(base))
        streams.append(gumbel(token_keys(torch.tensor([sample_key(*changed)]), torch.tensor([5])), codes))
    streams.append(gumbel(token_keys(torch.tensor([sample_key(*base)]), torch.tensor([6])), codes))
    for one, other in itertools.combinations(streams, 2):
        assert not (one == other).any()


@pytest.mark.parametrize("bit", [0, 15, 31, 32, 47, 63])
def test_every_bit_of_a_key_matters(bit: int) -> None:
    flipped = 1 << bit if bit < 63 else -(1 << 63)
    noise = gumbel(torch.tensor([12345, 12345 ^ flipped]), vocabulary_codes(0, 4096))
    assert abs(torch.corrcoef(uniform(noise))[0, 1]) < 4.5 / 4096**0.5


def test_noise_is_uniform_after_undoing_the_transformation() -> None:
    noise = gumbel(keys(40, 25), vocabulary_codes(0, 1000))
    assert noise.isfinite().all()
    u = uniform(noise.flatten()).sort().values
    n = len(u)
    # Kolmogorov-Smirnov: the distance exceeds 2 / sqrt(n) once in 1500 tries of a true uniform.
    assert (u - (torch.arange(n) + 0.5) / n).abs().max() < 2 / n**0.5


@pytest.mark.parametrize("axis", ["samples", "positions", "vocabulary"])
@pytest.mark.parametrize("lag", [1, 2, 16])
def test_noise_is_uncorrelated(axis: str, lag: int) -> None:
    u = uniform(gumbel(keys(60, 60), vocabulary_codes(0, 256))).reshape(60, 60, 256)
    u = u.movedim(["samples", "positions", "vocabulary"].index(axis), 0)
    a, b = u[:-lag].flatten(), u[lag:].flatten()
    correlation = torch.corrcoef(torch.stack([a, b]))[0, 1]
    assert abs(correlation) < 4.5 / len(a) ** 0.5


def test_winners_are_independent_of_the_winners_before() -> None:
    """Pairs of consecutive winners among 16 equal tokens: chi-square over the 256 pairs."""
    winners = gumbel(keys(400, 400), vocabulary_codes(0, 16)).argmax(dim=-1).reshape(400, 400)
    for a, b in ((winners[:, ::2], winners[:, 1::2]), (winners[::2], winners[1::2])):
        counts = torch.bincount((a * 16 + b).flatten(), minlength=256).double()
        expected = counts.sum() / 256
        statistic = float(((counts - expected) ** 2 / expected).sum())
        # 255 degrees of freedom: mean 255, standard deviation 22.6.
        assert 165 < statistic < 355


def test_rare_tokens_are_drawn_as_often_as_they_should() -> None:
    """A tail of 4000 tokens that together have a probability of 1%: it is the noise's far end that draws them."""
    logits = torch.full((4001,), -torch.inf)
    logits[0], logits[1:] = torch.tensor(0.99).log(), torch.tensor(0.01 / 4000).log()
    codes = vocabulary_codes(0, 4001)
    draws = [(logits + gumbel(keys(20, 100, seed=seed), codes)).argmax(dim=-1) for seed in range(10)]
    tail = int((torch.cat(draws) > 0).sum())
    # Binomial(20000, 0.01): mean 200, standard deviation 14.1.
    assert 140 < tail < 260
