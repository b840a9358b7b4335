"""Whether numbers are finite: decided alike by all processes of a run, and which of a model's are not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import inf

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from nemo_spin.runtime.collectives import gathered

_LAYERS = "decoder.layers."


def are_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all of them are; the largest magnitude of NaN and others is NaN."""
    filled = [tensor for tensor in tensors if tensor.numel()]
    return bool(torch.nn.utils.get_total_norm(filled, inf).isfinite())


def weights_not_finite(gpt: GPTModel) -> list[str]:
    """The names of the parameters that hold NaN or infinity on some process; every process calls it."""
    return _names(gpt, lambda parameter: parameter.detach())


def gradients_not_finite(gpt: GPTModel) -> list[str]:
    """The same of the gradients of the last backward pass, which lie there until `zero_grad`."""
    return _names(gpt, lambda parameter: getattr(parameter, "main_grad", None))


def _names(gpt: GPTModel, of: Callable[[torch.nn.Parameter], Tensor | None]) -> list[str]:
    own = [
        _global_name(gpt, name)
        for name, parameter in gpt.named_parameters()
        if (tensor := of(parameter)) is not None and not are_finite([tensor])
    ]
    return sorted({name for names in gathered(own) for name in names})


def _global_name(gpt: GPTModel, name: str) -> str:
    """A pipeline stage counts its layers from 0; megatron-core's layers know their number in the model, from 1."""
    if not name.startswith(_LAYERS):
        return name
    number, _, rest = name.removeprefix(_LAYERS).partition(".")
    return f"{_LAYERS}{gpt.decoder.layers[int(number)].layer_number - 1}.{rest}"
