"""Log-probabilities of response tokens from a model whose logits are sharded over the vocabulary.

The model is given the token that follows each position and returns its negative log-probability. Its logits, the
largest tensor of a step, then stay as megatron-core holds them, [s, b, v]: to return them, it would transpose them, at
the price of a copy in the forward pass and two in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from nemo_spin.pairs import TokenBatch


@contextmanager
def vocab_padding_masked(model: torch.nn.Module, vocab_size: int) -> Iterator[None]:
    """Inside, padding rows of the vocabulary, those from `vocab_size` on, have no part in the model's softmax.

    model: GPTModel or its DDP wrapper.
    """
    gpt = getattr(model, "module", model)
    if not gpt.post_process:
        yield
        return

    def mask(_module: torch.nn.Module, _inputs: Any, output: tuple[Tensor, Tensor | None]) -> None:
        mask_vocab_padding(output[0], vocab_size)

    handle = gpt.output_layer.register_forward_hook(mask)
    try:
        yield
    finally:
        handle.remove()


def mask_vocab_padding(logits: Tensor, vocab_size: int) -> Tensor:
    """Set the logits of padding rows, those from `vocab_size` on, to -inf in place.

    logits: [..., padded_vocab_rows / tensor_model_parallel_size], this rank's part of the vocabulary.
    """
    rows = logits.shape[-1]
    real_rows = vocab_size - parallel_state.get_tensor_model_parallel_rank() * rows
    if real_rows < rows:
        # Behind autograd's back, which would copy the logits' gradient: where the probability is 0, it is 0 already.
        logits.detach()[..., max(real_rows, 0) :] = float("-inf")
    return logits


def next_tokens(batch: TokenBatch) -> Tensor:
    """int64 [b, s]: the token after each one, the model's labels; after the last one comes anything.

    This and `per_token_logps` are the one place where outputs are shifted against tokens.
    """
    return batch.tokens.roll(-1, dims=1)


def per_token_logps(next_token_nll: Tensor, batch: TokenBatch) -> Tensor:
    """The log-probability of every response token given what comes before it.

    next_token_nll: fp32 [b, s], the negative log-probability of `next_tokens`.
    Returns fp32 [b, s-1], entry t for token t+1; 0 where that token is prompt or padding. The same on every
    tensor-parallel rank.
    """
    return torch.where(batch.response_mask[:, 1:], -next_token_nll[:, :-1], 0.0)


def of_each_response(logps: Tensor, batch: TokenBatch) -> list[Tensor]:
    """`per_token_logps` [b, s-1] cut into one fp32 tensor [len(response)] per sequence, on the CPU."""
    mask = batch.response_mask[:, 1:].cpu()
    return [row[selected].clone() for row, selected in zip(logps.cpu(), mask, strict=True)]
