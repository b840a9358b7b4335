"""Lets NeMo's GPT classes run without CUDA, TransformerEngine and Apex. Imported inside the readers' environments.

Nothing that reads a checkpoint is replaced: what is, is listed in `STUBS`, and the check prints it.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

# Read by NeMo 1 when its model is built; any release after those that it has special cases for.
os.environ.setdefault("NVIDIA_PYTORCH_VERSION", "23.12")

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig

STUBS = [
    "torch.cuda: the current device is the CPU, streams do nothing",
    "megatron-core's CUDA random states: drawing numbers changes no state",
    "options for speed that need CUDA kernels (apply_rope_fusion, persist_layer_norm, ...) are off in every model",
    "megatron-core's local layers in place of TransformerEngine's; their norm knows zero-centred weights as well",
]
_SPEED = (
    "apply_rope_fusion",
    "persist_layer_norm",
    "gradient_accumulation_fusion",
    "masked_softmax_fusion",
    "bias_dropout_fusion",
)


class _ZeroCenteredNorm(torch.nn.Module):
    """LayerNorm or RMSNorm whose stored weight is the difference from 1."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.zeros(hidden_size))
        self.is_layer_norm = config.normalization == "LayerNorm"
        if self.is_layer_norm:
            self.bias = torch.nn.Parameter(torch.zeros(hidden_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.is_layer_norm:
            return F.layer_norm(x, self.weight.shape, 1 + self.weight, self.bias, self.eps)
        return F.rms_norm(x, self.weight.shape, 1 + self.weight, self.eps)


def install() -> None:
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.set_device = lambda device: None
    torch.cuda.Stream = lambda *args, **kwargs: None
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    CudaRNGStatesTracker.fork = lambda self, name=None: contextlib.nullcontext()

    check_config, make_norm = TransformerConfig.__post_init__, WrappedTorchNorm.__new__

    def without_speed(self: TransformerConfig) -> None:
        for name in _SPEED:
            setattr(self, name, False)
        check_config(self)

    def norm(cls: type, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> Any:
        if config.layernorm_zero_centered_gamma:
            return _ZeroCenteredNorm(config, hidden_size, eps)
        return make_norm(cls, config=config, hidden_size=hidden_size, eps=eps, **kwargs)

    TransformerConfig.__post_init__ = without_speed
    WrappedTorchNorm.__new__ = norm


@torch.no_grad()
def difference(gpt: torch.nn.Module, truth: dict[str, torch.Tensor]) -> float:
    """The largest difference of the model's logits, computed in fp32, from the expected ones."""
    ids = truth["input_ids"]
    length = ids.shape[1]
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    gpt = gpt.float().eval()
    logits = gpt(ids, torch.arange(length).expand_as(ids), mask)
    return float((logits[..., : truth["logits"].shape[-1]] - truth["logits"]).abs().max())
