"""Opens the weights of a megatron-core directory, in whichever layout they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nemo_spin.model_io.stores.stacked import StackedStore
from nemo_spin.model_io.stores.torch_dist import TorchDistStore
from nemo_spin.model_io.stores.zarr import ZarrStore, is_zarr


def open_store(directory: Path, prefix: str, origin: str, sizes: Mapping[str, int] | None = None) -> StackedStore:
    """prefix: before the names of weights. origin: names the checkpoint in messages. sizes: bytes of each file, where
    only the descriptions are unpacked yet. Raises CheckpointError, see `TorchDistStore` and `ZarrStore`.
    """
    store_type = ZarrStore if is_zarr(directory) else TorchDistStore
    return store_type(directory, prefix, origin, sizes=sizes)
