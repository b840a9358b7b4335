"""Log-probabilities of tokens from logits that are sharded over the vocabulary."""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor

from nemo_spin.pairs import TokenBatch


def mask_vocab_padding(logits: Tensor, vocab_size: int) -> Tensor:
    """Set the logits of padding rows, those from `vocab_size` on, to -inf in place.

    logits: [..., padded_vocab_rows / tensor_model_parallel_size], this rank's part of the vocabulary.
    """
    rows = logits.shape[-1]
    real_rows = vocab_size - parallel_state.get_tensor_model_parallel_rank() * rows
    if real_rows < rows:
        logits[..., max(real_rows, 0) :] = float("-inf")
    return logits


def per_token_logps(logits: Tensor, batch: TokenBatch, vocab_size: int) -> Tensor:
    """The log-probability of every response token given what comes before it.

    logits: [b, s, padded_vocab_rows / tensor_model_parallel_size], of any dtype; overwritten.
    Returns fp32 [b, s-1], entry t for token t+1; 0 where that token is prompt or padding. The same on every
    tensor-parallel rank.

    This is the one place where logits are shifted against tokens.
    """
    # The targets are rolled, not the logits sliced: a slice would cost a copy of the largest tensor of the step.
    next_tokens = batch.tokens.roll(-1, dims=1)
    logits = mask_vocab_padding(logits.float(), vocab_size)
    logps = -vocab_parallel_cross_entropy(logits, next_tokens)
    return torch.where(batch.response_mask[:, 1:], logps[:, :-1], 0.0)


def of_each_response(logps: Tensor, batch: TokenBatch) -> list[Tensor]:
    """`per_token_logps` [b, s-1] cut into one fp32 tensor [len(response)] per sequence, on the CPU."""
    mask = batch.response_mask[:, 1:].cpu()
    return [row[selected].clone() for row, selected in zip(logps.cpu(), mask, strict=True)]
