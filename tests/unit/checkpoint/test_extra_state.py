"""The empty objects beside weights, against what megatron-core's own layers and NeMo's checkpoints have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp
from megatron.core.transformer.utils import make_sharded_object_for_checkpoint

from nemo_spin.checkpoint.extra_state import extra_state

CHECKPOINTS = Path(__file__).resolve().parents[3] / "shared" / "checkpoints"
if not CHECKPOINTS.is_dir():
    CHECKPOINTS = Path(__file__).resolve().parents[4] / "shared" / "checkpoints"
WITHIN = [
    "self_attention.linear_qkv.layer_norm_weight",
    "self_attention.linear_qkv.weight",
    "self_attention.linear_qkv.bias",
    "self_attention.linear_proj.weight",
    "mlp.linear_fc1.layer_norm_weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
]
OUTER = ["embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight"]


def keys(layers: int, more: tuple[str, ...] = ()) -> set[str]:
    names = [f"decoder.layers.{layer}.{name}" for layer in range(layers) for name in (*WITHIN, *more)]
    return {entry.unique_key for entry in extra_state([*names, *OUTER], "module.")}


def test_one_for_each_module_of_the_decoder() -> None:
    modules = "self_attention.linear_qkv self_attention.core_attention self_attention.linear_proj mlp.linear_fc1 "
    modules += "mlp.linear_fc2 self_attention.q_layernorm"
    expected = {"module.decoder.final_layernorm._extra_state/shard_0_1"} | {
        # As megatron-core names the objects of layers that are alike.
        make_sharded_object_for_checkpoint(
            None, f"module.decoder.layers.{module}._extra_state", [(0, layer, 12)], replica_id=0
        ).unique_key
        for module in modules.split()
        for layer in range(12)
    }
    assert keys(12, ("self_attention.q_layernorm.weight",)) == expected


@pytest.mark.skipif(not CHECKPOINTS.is_dir(), reason="the genuine checkpoints are not beside the repository")
@pytest.mark.parametrize(("name", "layers"), [("nemo2_llama", 3), ("nemo2_gpt2", 2), ("nemo2_sft", 3)])
def test_no_genuine_checkpoint_has_another(name: str, layers: int) -> None:
    metadata = dcp.FileSystemReader(CHECKPOINTS / name / "weights").read_metadata()
    genuine = {key for key in metadata.state_dict_metadata if "_extra_state" in key and not key.startswith("optimizer")}
    assert genuine
    assert genuine <= keys(layers)
