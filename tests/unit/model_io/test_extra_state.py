from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from stores import MemoryStore

from nemo_spin.model_io.stores.extra_state import empty_extra_state, extra_state_keys
from nemo_spin.model_io.stores.torch_dist import TorchDistStore, write_torch_dist

NAMES = [
    "embedding.word_embeddings.weight",
    "decoder.final_layernorm.weight",
    *(
        f"decoder.layers.{layer}.{name}"
        for layer in range(2)
        for name in (
            "self_attention.linear_qkv.weight",
            "self_attention.linear_qkv.layer_norm_weight",
            "mlp.linear_fc2.bias",
        )
    ),
    "output_layer.weight",
]


def test_one_for_each_module_of_each_layer() -> None:
    assert extra_state_keys(NAMES, "module.") == [
        "module.decoder.final_layernorm._extra_state/shard_0_1",
        "module.decoder.layers.mlp.linear_fc2._extra_state/shard_0_2",
        "module.decoder.layers.mlp.linear_fc2._extra_state/shard_1_2",
        "module.decoder.layers.self_attention.core_attention._extra_state/shard_0_2",
        "module.decoder.layers.self_attention.core_attention._extra_state/shard_1_2",
        "module.decoder.layers.self_attention.linear_qkv._extra_state/shard_0_2",
        "module.decoder.layers.self_attention.linear_qkv._extra_state/shard_1_2",
    ]
    assert torch.load(empty_extra_state(), weights_only=True) == [None]


def test_they_are_written_and_are_no_weights(tmp_path: Path) -> None:
    store = MemoryStore({name: torch.randn(4, 2) for name in NAMES})
    write_torch_dist(store, tmp_path, "")
    written = dcp.FileSystemReader(tmp_path).read_metadata().state_dict_metadata
    assert set(extra_state_keys(NAMES, "")) <= set(written)
    assert set(TorchDistStore(tmp_path, "", "it").tensors) == set(NAMES)
