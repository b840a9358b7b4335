"""The part of the vocabulary whose logits a tensor-parallel rank has."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor


class VocabularyShard:
    """Ids from `start` on, as many as the output layer has rows here; `size` of them are no padding."""

    def __init__(self, rows: int, vocab_size: int) -> None:
        self._group = parallel_state.get_tensor_model_parallel_group()
        self.parts = self._group.size()
        self.start, self.rows = self._group.rank() * rows, rows
        self.size = max(0, min(rows, vocab_size - self.start))

    def gather(self, own: Tensor) -> Tensor:
        """[b, n] of every rank -> [b, ranks * n], in the order of the ids."""
        if self.parts == 1:
            return own
        parts = torch.empty(self.parts, *own.shape, dtype=own.dtype, device=own.device)
        dist.all_gather_into_tensor(parts.view(-1, own.shape[1]), own.contiguous(), group=self._group)
        return parts.transpose(0, 1).flatten(1)
