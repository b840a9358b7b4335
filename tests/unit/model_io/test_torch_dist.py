"""torch_dist and zarr directories: what is written piece by piece is read back, here and by their own readers."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from stores import MemoryStore, random_store, write_zarr

from nemo_spin.errors import CheckpointError
from nemo_spin.megatron.architecture import Architecture
from nemo_spin.model_io.nemo1.config import architecture_from_nemo1
from nemo_spin.model_io.stores import torch_dist
from nemo_spin.model_io.stores.interface import EMBEDDING, StoredTensor
from nemo_spin.model_io.stores.stacked import StackedStore
from nemo_spin.model_io.stores.torch_dist import TorchDistStore, write_torch_dist
from nemo_spin.model_io.stores.zarr import ZarrStore

FC1 = "decoder.layers.1.mlp.linear_fc1.weight"


@pytest.fixture(name="architecture")
def _architecture() -> Architecture:
    config = {
        "mcore_gpt": True,
        "num_layers": 3,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "ffn_hidden_size": 24,
        "activation": "fast-swiglu",
        "normalization": "rmsnorm",
        "bias": False,
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": False,
    }
    return architecture_from_nemo1(config, {EMBEDDING: StoredTensor((50, 16), torch.bfloat16)}, None, "it")


def assert_same(found: StackedStore, store: MemoryStore) -> None:
    assert found.tensors == store.tensors
    for name, expected in store.weights.items():
        assert torch.equal(found.read(name), expected), name
    region = (slice(5, 29), slice(3, 9))
    assert torch.equal(found.read(FC1, region), store.weights[FC1][region])


@pytest.mark.parametrize("prefix", ["model.", "module.", ""])
def test_what_is_written_is_read_back(
    tmp_path: Path, architecture: Architecture, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_dist, "_PIECE", 7 * 16 * 2)
    store = random_store(architecture)
    write_torch_dist(store, tmp_path / "weights", prefix)
    assert store.largest <= 7 * 16
    assert_same(TorchDistStore(tmp_path / "weights", prefix, "it"), store)
    assert torch.load(tmp_path / "weights" / "common.pt", weights_only=True) == {}


def test_torch_reads_what_is_written_with_stacked_layers(tmp_path: Path, architecture: Architecture) -> None:
    store = random_store(architecture)
    write_torch_dist(store, tmp_path, "model.")
    stacked = {"model.decoder.layers.mlp.linear_fc1.weight": torch.empty(3, 48, 16, dtype=torch.bfloat16)}
    dcp.load(stacked, checkpoint_id=tmp_path, no_dist=True)
    for layer, found in enumerate(stacked["model.decoder.layers.mlp.linear_fc1.weight"]):
        assert torch.equal(found, store.weights[FC1.replace("1", str(layer), 1)])


def test_a_damaged_piece_is_named(tmp_path: Path, architecture: Architecture) -> None:
    write_torch_dist(random_store(architecture), tmp_path, "model.")
    (shard,) = tmp_path.glob("*.distcp")
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(CheckpointError, match=f"{EMBEDDING} cannot be read"):
        TorchDistStore(tmp_path, "model.", "it").read(EMBEDDING)


def test_zarr_with_bf16(tmp_path: Path, architecture: Architecture) -> None:
    store = random_store(architecture)
    write_zarr(store, tmp_path)
    assert json.loads((tmp_path / "model.output_layer.weight" / ".zarray").read_text())["dtype"] == "bfloat16"
    assert_same(ZarrStore(tmp_path, "model.", "it"), store)


@pytest.mark.parametrize(("damage", "words"), [("missing", "1.0.0 is missing"), ("truncated", "1.0.0 is truncated")])
def test_a_chunk_that_is_not_whole(tmp_path: Path, architecture: Architecture, damage: str, words: str) -> None:
    write_zarr(random_store(architecture), tmp_path)
    chunk = tmp_path / "model.decoder.layers.mlp.linear_fc1.weight" / "1.0.0"
    content = np.fromfile(chunk, dtype=np.uint8)
    chunk.unlink()
    if damage == "truncated":
        content[: len(content) // 2].tofile(chunk)
    with pytest.raises(CheckpointError, match=f"linear_fc1.weight/{words}"):
        ZarrStore(tmp_path, "model.", "it")


def test_without_tensorstore_one_sentence_names_the_extra(
    tmp_path: Path, architecture: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_zarr(random_store(architecture), tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "tensorstore", None)
    with pytest.raises(CheckpointError, match=r"pip install 'nemo-spin\[zarr\]'"):
        ZarrStore(tmp_path, "model.", "it")


def full_disk() -> None:
    """As torch leaves it: the zip file that it closes fails because of the disk."""
    try:
        raise OSError(errno.ENOSPC, "No space left on device")
    finally:
        raise RuntimeError("unexpected pos 704 vs 598")


def ctrl_c() -> None:
    raise KeyboardInterrupt


def damaged() -> None:
    try:
        raise EOFError
    except EOFError as error:
        raise CheckpointError("it is damaged") from error


@pytest.mark.parametrize(
    ("fail", "expected"), [(full_disk, OSError), (ctrl_c, KeyboardInterrupt), (damaged, CheckpointError)]
)
def test_what_stops_a_writer_is_raised_as_it_was(
    tmp_path: Path, architecture: Architecture, fail: Callable[[], None], expected: type[BaseException]
) -> None:
    store = random_store(architecture)
    store.read = lambda *_: fail()
    with pytest.raises(expected):
        write_torch_dist(store, tmp_path / "weights", "")
