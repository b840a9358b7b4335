"""What NeMo asks for beside weights is written, whichever stage writes and whichever way."""

from __future__ import annotations

from pathlib import Path

import torch.distributed.checkpoint as dcp
from harness import Workers
from toy import toy_architecture

from nemo_spin.megatron.gpt import build_gpt
from nemo_spin.model_io.stores.torch_dist import TorchDistStore, write_torch_dist
from nemo_spin.model_io.weights import save_weights

ARCHITECTURE = toy_architecture(qk_layernorm=True)


def save(directory: Path) -> None:
    save_weights(build_gpt(ARCHITECTURE, "32"), directory, ARCHITECTURE.vocab_rows)


def extra_state_keys(directory: Path) -> set[str]:
    metadata = dcp.FileSystemReader(directory).read_metadata()
    return {key for key in metadata.state_dict_metadata if "_extra_state" in key}


def test_models_and_stores_write_the_same_empty_objects(workers: Workers, tmp_path: Path) -> None:
    workers.run(save, tmp_path / "saved", tp=2, pp=2)
    saved = extra_state_keys(tmp_path / "saved")
    # q, k and core attention, qkv, projection, and the two of the feed-forward layer; the norm at the end.
    assert len(saved) == 7 * ARCHITECTURE.transformer["num_layers"] + 1
    assert "model.decoder.layers.self_attention.core_attention._extra_state/shard_3_4" in saved
    write_torch_dist(TorchDistStore(tmp_path / "saved", "model.", "it"), tmp_path / "written", "model.")
    assert extra_state_keys(tmp_path / "written") == saved
    # What megatron-core reads, and torch without it.
    assert not set(TorchDistStore(tmp_path / "written", "model.", "it").tensors) & saved
