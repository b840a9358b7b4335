"""Puts a model that is being trained into the state in which it can generate, and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

# What megatron-core's and TransformerEngine's modules ask before they split or gather the sequence.
_SEQUENCE_PARALLEL = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")


@contextmanager
def generating(model: torch.nn.Module) -> Iterator[None]:
    """Inside: evaluation mode, no gradients, no sequence parallelism (one token cannot be split over ranks).

    Afterwards, also after an error, every module has the flags that it had. What the layers keep for their next call
    must not be made inside, on a CPU: training could not use it.
    """
    modules = list(model.modules())
    training = [module for module in modules if module.training]
    owners = modules + list({id(config): config for m in modules if (config := getattr(m, "config", None))}.values())
    split = [(owner, name) for owner in owners for name in _SEQUENCE_PARALLEL if vars(owner).get(name) is True]
    try:
        for owner, name in split:
            setattr(owner, name, False)
        model.eval()
        with _without_gradients(model):
            yield
    finally:
        for owner, name in split:
            setattr(owner, name, True)
        for module in training:
            module.training = True


def _without_gradients(model: torch.nn.Module) -> AbstractContextManager[None]:
    # On a CPU inference_mode saves a twentieth of a decode step. TransformerEngine's layers keep tensors over calls.
    on_cpu = next(model.parameters()).device.type == "cpu"
    return torch.inference_mode() if on_cpu else torch.no_grad()
