"""TransformerEngine's `_extra_state` in a checkpoint: nothing is in it, but it has to be there.

TransformerEngine keeps the scales of fp8 training beside the weights of its modules, one object per module, empty
without fp8. megatron-core refuses a checkpoint that lacks one of those that its model asks for ("Missing key in
checkpoint state_dict: ..._extra_state/shard_0_32"), and ignores those that it does not ask for. Which ones it asks for
differs between its layers and releases: so all are written. None is what megatron-core's own layers write, and what
TransformerEngine takes for "no state".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from megatron.core.dist_checkpointing.mapping import ShardedObject

from nemo_spin.checkpoint.weight_store import LAYERS

_ATTENTION = "self_attention.linear_proj"


def extra_state(names: Iterable[str], prefix: str) -> Iterator[ShardedObject]:
    """What to write beside weights: an empty object per module of the decoder, under the key of stacked layers.

    names: of the weights, without prefix and with layers one by one ("decoder.layers.0.mlp.linear_fc1.weight").
    prefix: before the names, as in `torch_dist.write_torch_dist`.
    """
    modules = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
    layers = 1 + max((int(module.split(".")[2]) for module in modules if module.startswith(LAYERS)), default=-1)
    for module in modules:
        if module == "decoder.final_layernorm":
            yield _empty(prefix + module, 0, 1)
        elif module.startswith(LAYERS):
            layer, _, within = module.removeprefix(LAYERS).partition(".")
            yield _empty(f"{prefix}{LAYERS}{within}", int(layer), layers)
            if within == _ATTENTION:
                yield _empty(f"{prefix}{LAYERS}self_attention.core_attention", int(layer), layers)


def _empty(module: str, index: int, count: int) -> ShardedObject:
    return ShardedObject(f"{module}._extra_state", None, (count,), (index,))
