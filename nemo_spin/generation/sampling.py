"""From logits to token ids: penalties, filters and the draw, with the semantics of transformers' processors.

Every function takes logits as [b, v] float32, changes them in place and returns them. They are applied in the order of
this file, as transformers' `generate` does; greedy decoding takes only the first two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nemo_spin.generation.noise import gumbel, token_keys, vocabulary_codes

if TYPE_CHECKING:
    from nemo_spin.generation.rules import Rules
    from nemo_spin.generation.vocabulary import VocabularyShard

NO_TOKEN = -1
Gather = Callable[[Tensor], Tensor]


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


def keep_top_k(logits: Tensor, k: int, gather: Gather | None = None) -> Tensor:
    """Keep the k most likely tokens of each row, and those that tie with the last of them.

    gather: where this is a part of the vocabulary, brings together what each part has: k values, not all logits.
    """
    best = logits.topk(min(k, logits.shape[-1])).values
    if gather is not None:
        best = gather(best)
        best = best.topk(min(k, best.shape[-1])).values
    return logits.masked_fill_(logits < best[:, -1:], float("-inf"))


def keep_top_p(logits: Tensor, p: float, whole: Tensor | None = None) -> Tensor:
    """Keep the most likely tokens of each row whose probabilities first reach p, and those that tie with the last.

    whole: the logits of the whole vocabulary, where `logits` are those of a part.
    """
    ascending = (logits if whole is None else whole).sort(dim=-1).values
    removed = (ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - p).sum(dim=-1, keepdim=True)
    least = ascending.gather(1, removed.clamp_(max=ascending.shape[-1] - 1))
    return logits.masked_fill_(logits < least, float("-inf"))


class Sampler:
    """Chooses the next token of each row.

    rules: rows of the logits beyond its vocab_size are padding and never chosen; no id of its stop_ids is chosen before
        the response has min_length tokens.
    shard: the part of the vocabulary that this rank's logits are of, None for all of it. The ranks tell each other the
        best token of their parts; beside it top_k makes them exchange k logits of each part, and top_p all of them,
        because what it keeps depends on the sum of all probabilities in their order.
    """

    def __init__(self, rules: Rules, device: torch.device | str = "cpu", shard: VocabularyShard | None = None) -> None:
        self._sampling, self._vocab_size, self._min_length = rules.sampling, rules.vocab_size, rules.min_length
        self.start, self.columns, self._size = 0, rules.vocab_size, rules.vocab_size
        self._shard = shard if shard is not None and shard.parts > 1 else None
        if self._shard is not None:
            self.start, self.columns, self._size = self._shard.start, self._shard.rows, self._shard.size
        own = sorted(i - self.start for i in rules.stop_ids if self.start <= i < self.start + self._size)
        self._stop_columns = torch.tensor(own, dtype=torch.int64, device=device)
        stop = self.start + self.columns
        self._codes = None if rules.sampling.use_greedy else vocabulary_codes(self.start, stop, device)

    @property
    def needs_seen_tokens(self) -> bool:
        return self._sampling.repetition_penalty != 1.0

    def __call__(self, logits: Tensor, sample_keys: Tensor, lengths: Tensor, seen: Tensor | None = None) -> Tensor:
        """logits: [b, >= columns], any float dtype; a float32 tensor is overwritten.
        sample_keys: [b] int64, see `noise.sample_key`. lengths: [b] int64, tokens of each response so far.
        seen: [b, columns] bool, needed where `needs_seen_tokens`.

        Returns [b] int64 ids, NO_TOKEN where the logits were not finite or every token was banned.
        """
        params = self._sampling
        logits = logits[:, : self.columns].float()
        if self._size < self.columns:
            logits[:, self._size :] = float("-inf")
        if self.needs_seen_tokens:
            assert seen is not None
            penalize_repetition(logits, seen, params.repetition_penalty)
        if self._min_length > 0 and len(self._stop_columns):
            ban(logits, lengths < self._min_length, self._stop_columns)
        if not params.use_greedy:
            if params.temperature != 1.0:
                divide_by_temperature(logits, params.temperature)
            if params.top_k > 0:
                keep_top_k(logits, params.top_k, self._shard and self._shard.gather)
            if params.top_p < 1.0:
                keep_top_p(logits, params.top_p, self._shard and self._shard.gather(logits)[:, : self._vocab_size])
            logits.add_(gumbel(token_keys(sample_keys, lengths), self._codes))
        best, ids = logits.max(dim=-1)
        if self._shard is not None:
            best, ids = self._best_of_all(best, ids + self.start)
        return ids.masked_fill_(~best.isfinite(), NO_TOKEN)

    def _best_of_all(self, best: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The best of the parts' best tokens; of equal ones that with the smallest id, as within a part."""
        assert self._shard is not None
        # Two numbers in one message; both are exact in float64.
        both = self._shard.gather(torch.stack((best.double(), ids.double()), dim=1))
        values, part = both[:, 0::2].max(dim=1)
        return values, both[:, 1::2].gather(1, part[:, None])[:, 0].long()


class SeenTokens:
    """Which tokens each slot's prompt and response hold; moves with the slots of the cache.

    mask: [slots, columns] bool, the columns being those of the sampler's logits: the ids from `start` on.
    """

    def __init__(self, slots: int, columns: int, device: torch.device | str = "cpu", start: int = 0) -> None:
        self.mask = torch.zeros(slots, columns, dtype=torch.bool, device=device)
        self._start, self._columns = start, columns

    def admit(self, first: int, sequences: Sequence[Sequence[int]]) -> None:
        """Slots first, first + 1, ... begin anew with these tokens."""
        for slot, sequence in enumerate(sequences, start=first):
            row = self.mask[slot]
            row.zero_()
            own = sorted({i - self._start for i in sequence if self._start <= i < self._start + self._columns})
            row[torch.tensor(own, dtype=torch.int64, device=row.device)] = True

    def add(self, first: int, ids: Tensor) -> None:
        """Slots first, first + 1, ... each got one more token. ids: [b] int64."""
        columns = ids[:, None] - self._start
        inside = (columns >= 0) & (columns < self._columns)
        columns = columns.clamp(0, self._columns - 1)
        mask = self.mask[first : first + len(ids)]
        mask.scatter_(1, columns, mask.gather(1, columns) | inside)

    def move(self, sources: Tensor, destinations: Tensor) -> None:
        self.mask[destinations] = self.mask[sources]
