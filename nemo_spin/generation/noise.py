"""Random numbers that are a function of what they are for, not of when or where they are drawn.

The noise of (seed, iteration, sample, token position, vocabulary id) is a hash of these five numbers, a sample being
known by the index of its prompt and its number among the responses to it. So a response depends neither on the rows it
was batched with, nor on the rank, nor on what was generated before it.

Tokens are drawn by the Gumbel-max trick: the argmax of logits + Gumbel noise is a sample of their softmax. Against the
inverse of the cumulative distribution it has two advantages. A difference in rounding between parallel layouts changes
a token only where two scores nearly tie, while a cumulative sum adds up the rounding of the whole vocabulary. And every
tensor-parallel rank can find the argmax of its own part of the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def _signed(value: int, bits: int = 64) -> int:
    """The signed number with the same bits: torch has signed integers only."""
    return value - (1 << bits) if value >> (bits - 1) else value


def _mix(value: int) -> int:
    """SplitMix64's finalizer (Steele, Lea, Flood 2014) on an unsigned 64-bit number."""
    value = ((value ^ (value >> 30)) * _MULTIPLIERS[0]) & _MASK
    value = ((value ^ (value >> 27)) * _MULTIPLIERS[1]) & _MASK
    return value ^ (value >> 31)


def _shift_right(x: Tensor, bits: int, width: int, out: Tensor | None = None) -> Tensor:
    """Logical shift: torch's own fills with the sign."""
    return torch.bitwise_right_shift(x, bits, out=out).bitwise_and_((1 << (width - bits)) - 1)


def _mix_tensor(x: Tensor) -> Tensor:
    """`_mix` of an int64 tensor."""
    x = (x ^ _shift_right(x, 30, 64)) * _signed(_MULTIPLIERS[0])
    x = (x ^ _shift_right(x, 27, 64)) * _signed(_MULTIPLIERS[1])
    return x ^ _shift_right(x, 31, 64)


def sample_key(seed: int, iteration: int, index: int, sample: int = 0) -> int:
    """The signed 64-bit key of one sample's stream of random numbers.

    sample: number of the response to this prompt, >= 0. Training makes response 0 only, whose key has no fourth round.
    """
    key = 0
    for value in (seed, iteration, index, sample)[: 4 if sample else 3]:
        key = _mix(((key ^ (value & _MASK)) + _GOLDEN) & _MASK)
    return _signed(key)


def token_keys(sample_keys: Tensor, positions: Tensor) -> Tensor:
    """The keys of single tokens.

    sample_keys: [b] int64, from `sample_key`. positions: [b] int64, the token's position in its response, from 0.
    Returns [b] int64: output number `positions` of the SplitMix64 generator that starts at the sample's key.
    """
    return _mix_tensor(sample_keys + (positions + 1) * _signed(_GOLDEN))


def vocabulary_codes(start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
    """[stop - start] int32: a hash of each vocabulary id, computed once, the third input of `gumbel`."""
    codes = _mix_tensor((torch.arange(start, stop, device=device) + 1) * _signed(_GOLDEN))
    return (codes >> 32).to(torch.int32)


def gumbel(keys: Tensor, codes: Tensor) -> Tensor:
    """Standard Gumbel noise for every token of the vocabulary.

    keys: [b] int64, from `token_keys`. codes: [v] int32, from `vocabulary_codes`. Returns [b, v] float32, finite.
    """
    # 32-bit integers in place: the largest tensors of sampling, and most of its cost. Both halves of the key enter
    # before the two rounds of Ellis's lowbias32; the product between them keeps them from cancelling each other.
    high, low = (keys >> 32).to(torch.int32), (keys << 32 >> 32).to(torch.int32)
    x = (codes[None, :] ^ low[:, None]).mul_(_signed(0x9E3779B1, 32)).bitwise_xor_(high[:, None])
    shifted = torch.empty_like(x)
    x.bitwise_xor_(_shift_right(x, 16, 32, out=shifted)).mul_(0x7FEB352D)
    x.bitwise_xor_(_shift_right(x, 15, 32, out=shifted)).mul_(_signed(0x846CA68B, 32))
    # The sign-filling shift cancels the sign: 31 uniform bits remain, exact in float32 where they are small, which is
    # where the winners are. The factor is a little below 2^-31, so that the uniform number stays below 1.
    x.bitwise_xor_(torch.bitwise_right_shift(x, 16, out=shifted))
    minus_uniform = torch.mul(x, -(1 - 2**-23) * 2**-31, out=shifted.view(torch.float32)).sub_(2**-32)
    return minus_uniform.log1p_().neg_().log_().neg_()
