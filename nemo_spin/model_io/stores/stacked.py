"""What the layouts of megatron-core have in common: a prefix before every name, and layers stacked on axis 0.

`model.decoder.layers.mlp.linear_fc1.weight` [layers, rows, columns] holds that weight of all layers. Layers may also
be stored one by one, as readers here see them in any case.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping

from torch import Tensor

from nemo_spin.errors import CheckpointError
from nemo_spin.model_io.stores.interface import EMBEDDING, LAYERS, Region, StoredTensor

# The largest models have some hundred.
MOST_LAYERS = 10_000
# Where no prefix tells weights from optimizer and random states.
_WEIGHTS = ("embedding.", "decoder.", "output_layer.")


class StackedStore(ABC):
    """A WeightStore over arrays under megatron-core's names. A subclass gives `layout`, its name, and `_read`."""

    layout: str

    def __init__(self, arrays: Mapping[str, StoredTensor], prefix: str, origin: str) -> None:
        """arrays: all that is stored, by full name; optimizer state and `_extra_state` are left out here.

        prefix: before the names of weights. origin: names the checkpoint in messages. Raises CheckpointError if the
        arrays are not those of a GPT.
        """
        self.origin = origin
        self.tensors: dict[str, StoredTensor] = {}
        # name -> (full name, layer in the stack)
        self._places: dict[str, tuple[str, int | None]] = {}
        for key, array in arrays.items():
            name = key.removeprefix(prefix)
            is_ours = key.startswith(prefix) if prefix else name.startswith(_WEIGHTS)
            if is_ours and not _is_extra_state(name):
                self._add(key, name, array)
        if EMBEDDING not in self.tensors:
            names = ", ".join(sorted(arrays)[:3]) or "nothing"
            raise CheckpointError(
                f"{origin} holds no {prefix}{EMBEDDING} (it holds {names}, ...): it is not a whole GPT; if it holds "
                "adapters, merge them into their base model first."
            )

    def _add(self, key: str, name: str, array: StoredTensor) -> None:
        within = name.removeprefix(LAYERS)
        if not name.startswith(LAYERS) or within[:1].isdigit() or not array.shape:
            self.tensors[name] = array
            self._places[name] = (key, None)
            return
        if array.shape[0] > MOST_LAYERS:
            raise CheckpointError(
                f"{self.origin} describes {array.shape[0]} layers of {name}: more than {MOST_LAYERS} are not read."
            )
        for layer in range(array.shape[0]):
            self.tensors[f"{LAYERS}{layer}.{within}"] = StoredTensor(array.shape[1:], array.dtype)
            self._places[f"{LAYERS}{layer}.{within}"] = (key, layer)

    def read(self, name: str, region: Region | None = None) -> Tensor:
        """See `WeightStore.read`."""
        key, layer = self._places[name]
        region = region or tuple(slice(0, size) for size in self.tensors[name].shape)
        if layer is None:
            return self._read(key, region)
        return self._read(key, (slice(layer, layer + 1), *region))[0]

    @abstractmethod
    def _read(self, key: str, region: Region) -> Tensor:
        """A region of the array of this full name."""


def check_volume(tensors: Iterable[StoredTensor], held: int, origin: str) -> None:
    """Raises CheckpointError if the weights need more bytes than are `held`: room is made for what is described."""
    described = sum(tensor.numel * tensor.dtype.itemsize for tensor in tensors)
    if described > held:
        raise CheckpointError(
            f"{origin} contradicts itself: it describes {described} bytes of weights, but its files hold {held}; copy "
            "it again or use another checkpoint."
        )


def _is_extra_state(name: str) -> bool:
    """TransformerEngine's fp8 statistics, of a layout and of no use here."""
    return name.endswith("_extra_state") or "._extra_state/" in name


# How much larger than the archive its files may be. Weights hardly shrink when they are compressed; text, to a tenth.
MOST_EXPANSION = 20
