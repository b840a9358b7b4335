"""The `_extra_state` entries that readers of a torch_dist directory insist on, empty.

TransformerEngine keeps fp8 statistics in them. megatron-core asks for one of each module with weights, and of the core
attention, whether fp8 is used or not, and raises where one is missing: neither Megatron-LM nor NeMo opens a checkpoint
without them. Those that a reader does not ask for are passed over.
"""

from __future__ import annotations

import io
from collections.abc import Iterable

import torch

from nemo_spin.model_io.stores.interface import LAYERS

_CORE_ATTENTION = "self_attention.core_attention"
_FINAL_NORM = "decoder.final_layernorm"


def extra_state_keys(names: Iterable[str], prefix: str) -> list[str]:
    """Keys of the entries, as megatron-core numbers them where layers are stacked.

    names: of all weights, layers one by one, without `prefix`, which goes before the keys.
    """
    layers, modules = set(), {_CORE_ATTENTION}
    for name in names:
        if name.startswith(LAYERS):
            layer, _, within = name.removeprefix(LAYERS).partition(".")
            layers.add(int(layer))
            modules.add(within.rpartition(".")[0])
    keys = [f"{_FINAL_NORM}._extra_state/shard_0_1"]
    for module in sorted(modules):
        keys += [f"{LAYERS}{module}._extra_state/shard_{layer}_{len(layers)}" for layer in sorted(layers)]
    return [prefix + key for key in keys]


def empty_extra_state() -> io.BytesIO:
    """The content of an entry: what megatron-core writes for a module without fp8.

    None, and not an empty tensor as of late: TransformerEngine takes None in all its releases.
    """
    content = io.BytesIO()
    torch.save([None], content)
    content.seek(0)
    return content
