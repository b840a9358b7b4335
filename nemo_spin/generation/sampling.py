"""From logits to token ids: penalties, filters and the draw, with the semantics of transformers' processors.

Every function takes logits as [b, v] float32, changes them in place and returns them. They are applied in the order of
this file, as transformers' `generate` does; greedy decoding takes only the first two.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nemo_spin.generation.noise import gumbel, token_keys, vocabulary_codes

if TYPE_CHECKING:
    from nemo_spin.config import SamplingParams

NO_TOKEN = -1


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens that occurred less likely (penalty above 1). seen: [b, v] bool, in the prompt or generated."""
    factor = torch.where(logits < 0, penalty, 1 / penalty)
    return logits.mul_(factor.masked_fill_(~seen, 1.0))


def ban(logits: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
    """Give no probability to these ids in these rows. rows: [b] bool. ids: [n] int64."""
    logits[:, ids] = logits[:, ids].masked_fill_(rows[:, None], float("-inf"))
    return logits


def divide_by_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Sharpen (below 1) or flatten (above 1) the distribution."""
    return logits.div_(temperature)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k most likely tokens of each row, and those that tie with the last of them."""
    least = logits.topk(min(k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill_(logits < least, float("-inf"))


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the most likely tokens of each row whose probabilities first reach p, and those that tie with the last."""
    ascending = logits.sort(dim=-1).values
    removed = (ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - p).sum(dim=-1, keepdim=True)
    least = ascending.gather(1, removed.clamp_(max=logits.shape[-1] - 1))
    return logits.masked_fill_(logits < least, float("-inf"))


class Sampler:
    """Chooses the next token of each row.

    vocab_size: the rows of the logits beyond it are padding and never chosen.
    min_length: no id of stop_ids is chosen before the response has this many tokens.
    """

    def __init__(
        self,
        sampling: SamplingParams,
        vocab_size: int,
        min_length: int,
        stop_ids: Iterable[int],
        device: torch.device | str = "cpu",
    ) -> None:
        self.sampling, self.vocab_size, self.min_length = sampling, vocab_size, min_length
        self._stop_ids = torch.tensor(sorted(i for i in stop_ids if i < vocab_size), dtype=torch.int64, device=device)
        self._codes = None if sampling.use_greedy else vocabulary_codes(0, vocab_size, device)

    @property
    def needs_seen_tokens(self) -> bool:
        return self.sampling.repetition_penalty != 1.0

    def __call__(self, logits: Tensor, sample_keys: Tensor, lengths: Tensor, seen: Tensor | None = None) -> Tensor:
        """logits: [b, >= vocab_size], any float dtype; a float32 tensor is overwritten.
        sample_keys: [b] int64, see `noise.sample_key`. lengths: [b] int64, tokens of each response so far.
        seen: [b, vocab_size] bool, needed where `needs_seen_tokens`.

        Returns [b] int64 ids, NO_TOKEN where the logits were not finite or every token was banned.
        """
        params = self.sampling
        logits = logits[:, : self.vocab_size].float()
        if self.needs_seen_tokens:
            assert seen is not None
            penalize_repetition(logits, seen, params.repetition_penalty)
        if self.min_length > 0 and len(self._stop_ids):
            ban(logits, lengths < self.min_length, self._stop_ids)
        if not params.use_greedy:
            if params.temperature != 1.0:
                divide_by_temperature(logits, params.temperature)
            if params.top_k > 0:
                keep_top_k(logits, params.top_k)
            if params.top_p < 1.0:
                keep_top_p(logits, params.top_p)
            logits.add_(gumbel(token_keys(sample_keys, lengths), self._codes))
        best, ids = logits.max(dim=-1)
        return ids.masked_fill_(~best.isfinite(), NO_TOKEN)


class SeenTokens:
    """Which tokens each slot's prompt and response hold; moves with the slots of the cache."""

    def __init__(self, slots: int, vocab_size: int, device: torch.device | str = "cpu") -> None:
        self.mask = torch.zeros(slots, vocab_size, dtype=torch.bool, device=device)

    def admit(self, first: int, prompts: Sequence[Sequence[int]]) -> None:
        """Slots first, first + 1, ... begin anew with these prompts."""
        for slot, prompt in enumerate(prompts, start=first):
            row = self.mask[slot]
            row.zero_()
            row[torch.tensor(sorted(set(prompt)), device=row.device)] = True

    def add(self, first: int, ids: Tensor) -> None:
        """Slots first, first + 1, ... each got one more token. ids: [b] int64, none negative."""
        self.mask[first : first + len(ids)].scatter_(1, ids[:, None], True)

    def move(self, sources: Tensor, destinations: Tensor) -> None:
        self.mask[destinations] = self.mask[sources]
