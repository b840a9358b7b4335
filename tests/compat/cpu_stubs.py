"""Lets NeMo's GPT classes run without CUDA, TransformerEngine and Apex. Imported in the readers' environments.

Nothing that reads a checkpoint is replaced: what is, is listed in `STUBS`, and the check prints it.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig

STUBS = [
    "torch.cuda: the current device is the CPU, streams do nothing",
    "megatron-core's CUDA random states: drawing numbers changes no state",
    "options for speed that need CUDA kernels (apply_rope_fusion, persist_layer_norm, ...) are off in every model",
    "TransformerEngine's layers: megatron-core's own in their place, under TransformerEngine's names of the weights",
]
_SPEED = (
    "apply_rope_fusion",
    "persist_layer_norm",
    "gradient_accumulation_fusion",
    "masked_softmax_fusion",
    "bias_dropout_fusion",
)


class _Norm(torch.nn.Module):
    """LayerNorm or RMSNorm; a zero-centred weight is stored as its difference from 1."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.config, self.eps = config, eps
        start = torch.zeros if config.layernorm_zero_centered_gamma else torch.ones
        self.weight = torch.nn.Parameter(start(hidden_size))
        if config.normalization == "LayerNorm":
            self.bias = torch.nn.Parameter(torch.zeros(hidden_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return normalize(self.config, x, self.weight, getattr(self, "bias", None), self.eps)


class _NormedLinear(ColumnParallelLinear):
    """A norm and a linear layer in one module, as TransformerEngine has them."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **options: Any) -> None:
        super().__init__(input_size, output_size, config=config, **options)
        norm = _Norm(config, input_size)
        self.layer_norm_weight = norm.weight
        if config.normalization == "LayerNorm":
            self.layer_norm_bias = norm.bias

    def forward(self, x: torch.Tensor, *args: Any, **options: Any) -> Any:
        bias = getattr(self, "layer_norm_bias", None)
        x = normalize(self.config, x, self.layer_norm_weight, bias, self.config.layernorm_epsilon)
        return super().forward(x, *args, **options)


def normalize(
    config: TransformerConfig, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    if config.layernorm_zero_centered_gamma:
        weight = 1 + weight
    if config.normalization == "LayerNorm":
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


def layers(config: TransformerConfig) -> ModuleSpec:
    """A layer with TransformerEngine's names of the weights, made of megatron-core's own parts."""
    spec = get_gpt_layer_local_spec(normalization=config.normalization, qk_layernorm=config.qk_layernorm)
    parts = spec.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = IdentityOp
    parts.sharded_state_dict_keys_map = {}
    parts.self_attention.submodules.linear_qkv = parts.mlp.submodules.linear_fc1 = _NormedLinear
    return spec


def install() -> None:
    """Before a model is built."""
    # NeMo 1 asks for it; any release after those that it has special cases for.
    os.environ.setdefault("NVIDIA_PYTORCH_VERSION", "23.12")
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.set_device = lambda device: None
    torch.cuda.Stream = lambda *args, **kwargs: None
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    CudaRNGStatesTracker.fork = lambda self, name=None: contextlib.nullcontext()

    check_config = TransformerConfig.__post_init__

    def without_speed(self: TransformerConfig) -> None:
        for name in _SPEED:
            setattr(self, name, False)
        check_config(self)

    def norm(cls: type, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> Any:
        return _Norm(config, hidden_size, eps)

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


def run_cases(read: Callable[[dict[str, Any]], tuple[str, float]], stubs: list[str]) -> None:
    """Read every case of the file that the command line names; each leaves a result beside its log, if it can.

    A case is read by a fork of this process: NeMo keeps state of a model that it loaded, and takes long to import.
    """
    for case in json.loads(Path(sys.argv[1]).read_text()):
        if child := os.fork():
            os.waitpid(child, 0)
            continue
        with open(case["log"], "w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            try:
                exercised, found = read(case)
                result = {"exercised": exercised, "difference": found, "stubs": stubs}
                Path(case["result"]).write_text(json.dumps(result))
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
