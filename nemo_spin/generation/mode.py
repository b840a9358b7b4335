"""Puts a model that is being trained into the state in which it can generate, and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# What megatron-core's and TransformerEngine's modules ask before they split or gather the sequence.
_SEQUENCE_PARALLEL = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")


@contextmanager
def generating(model: torch.nn.Module) -> Iterator[None]:
    """Inside: evaluation mode, no gradients, no sequence parallelism (one token cannot be split over ranks).

    Afterwards, also after an error, every module has the flags that it had. Gradients are switched off by no_grad and
    not by inference_mode: megatron-core caches rotary embeddings, and training must be able to use them.
    """
    modules = list(model.modules())
    training = [module for module in modules if module.training]
    owners = modules + list({id(config): config for m in modules if (config := getattr(m, "config", None))}.values())
    split = [(owner, name) for owner in owners for name in _SEQUENCE_PARALLEL if vars(owner).get(name) is True]
    try:
        for owner, name in split:
            setattr(owner, name, False)
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for owner, name in split:
            setattr(owner, name, True)
        for module in training:
            module.training = True
