"""Finding out what a path is: checkpoints made of names and shapes only, no weights are needed."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from nemo_spin.errors import CheckpointError
from nemo_spin.megatron.architecture import Architecture, layer_tensors, outer_tensors
from nemo_spin.model_io.nemo1.archive import pack
from nemo_spin.model_io.nemo1.config import architecture_from_nemo1, to_nemo1_config
from nemo_spin.model_io.open import open_checkpoint
from nemo_spin.model_io.stores.interface import EMBEDDING, StoredTensor

SHARD = "__0_0.distcp"
CONFIG = {
    "mcore_gpt": True,
    "num_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "normalization": "rmsnorm",
    "activation": "fast-swiglu",
    "bias": False,
    "position_embedding_type": "rope",
    "share_embeddings_and_output_weights": False,
    "encoder_seq_length": 32,
    "ffn_hidden_size": 24,
    "tokenizer": {"library": "sentencepiece", "model": "nemo:abc_tokenizer.model"},
    "trainer_devices": "${trainer.devices}",
}


def write_metadata(directory: Path, architecture: Architecture, prefix: str = "model.", **changes: Any) -> None:
    """changes: tensor name with "_" for "." -> shape, or None to leave it out."""
    shapes = dict(outer_tensors(architecture))
    layers = architecture.transformer["num_layers"]
    shapes |= {
        f"decoder.layers.{name}": (layers, *shape) for name, shape in layer_tensors(architecture.transformer).items()
    }
    shapes |= changes
    properties = TensorProperties(dtype=changes.pop("dtype", torch.bfloat16))
    entries = {
        prefix + name: TensorStorageMetadata(
            properties, torch.Size(shape), [ChunkStorageMetadata(torch.Size([0] * len(shape)), torch.Size(shape))]
        )
        for name, shape in shapes.items()
        if isinstance(shape, tuple)
    }
    directory.mkdir(parents=True, exist_ok=True)
    storage = {MetadataIndex(key): _StorageInfo(SHARD, 0, 4096) for key in entries}
    (directory / ".metadata").write_bytes(pickle.dumps(Metadata(entries, storage_data=storage)))
    (directory / SHARD).write_bytes(bytes(2**20))
    (directory / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))


def expected(config: dict[str, Any], rows: int = 50) -> Architecture:
    tensors = {EMBEDDING: StoredTensor((rows, config["hidden_size"]), torch.float32)}
    return architecture_from_nemo1(config, tensors, None, "it")


def write_nemo1(directory: Path, config: dict[str, Any] = CONFIG, **changes: Any) -> Path:
    write_metadata(directory / "model_weights", expected(CONFIG), **changes)
    (directory / "model_config.yaml").write_text(yaml.safe_dump(config))
    (directory / "abc_tokenizer.model").write_bytes(b"pieces")
    return directory


def write_nemo2(directory: Path) -> Path:
    write_metadata(directory / "weights", expected(CONFIG), prefix="module.")
    gpt = "nemo.collections.llm.gpt.model."
    config = {
        "_target_": gpt + "llama.LlamaConfig",
        "num_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "ffn_hidden_size": 24,
        "normalization": "RMSNorm",
        "layernorm_epsilon": 1e-5,
        "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": False,
        "seq_length": 32,
    }
    (directory / "context").mkdir(parents=True)
    (directory / "context" / "model.yaml").write_text(
        yaml.safe_dump({"_target_": gpt + "llama.LlamaModel", "config": config})
    )
    return directory


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as error, open_checkpoint(path) as source:
        source.architecture()
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def test_a_directory_and_its_archive_are_the_same_checkpoint(tmp_path: Path) -> None:
    directory = write_nemo1(tmp_path / "files")
    archive = tmp_path / "out" / "x.nemo"
    pack(directory, archive)
    assert [path.name for path in archive.parent.iterdir()] == ["x.nemo"]
    for path in (directory, archive):
        with open_checkpoint(path) as source:
            assert source.family == "nemo1"
            assert source.architecture(48) == expected(CONFIG | {"vocab_size": 48})
            assert source.tokenizer is not None
            assert source.tokenizer.source == "nemo:abc_tokenizer.model"
            assert (source.files_dir / "abc_tokenizer.model").read_bytes() == b"pieces"
            assert source.weights().tensors == source.tensors
            files = source.files_dir
        assert files.exists() == (path is directory)


@pytest.mark.parametrize("part", [".", "weights", "context"])
def test_a_nemo2_directory_or_a_part_of_it(tmp_path: Path, part: str) -> None:
    with open_checkpoint(write_nemo2(tmp_path / "ckpt") / part) as source:
        assert source.family == "nemo2"
        assert source.architecture() == expected(CONFIG)


@pytest.mark.parametrize("place", ["checkpoints", "."])
def test_the_newest_whole_checkpoint_of_a_run_is_used(tmp_path: Path, place: str) -> None:
    directory = tmp_path / "run" / place
    for step in (9, 10, 11, 12):
        write_nemo2(directory / f"gpt--val_loss=1.00-step={step}-consumed_samples=8.0")
    (directory / "gpt--val_loss=1.00-step=12-consumed_samples=8.0-unfinished").touch()
    (directory / "gpt--val_loss=1.00-step=11-consumed_samples=8.0" / "weights" / ".metadata").unlink()
    newest = directory / "gpt--val_loss=1.00-step=10-consumed_samples=8.0"
    os.utime(newest / "weights" / ".metadata", (0, 0))  # a copy keeps no times
    with open_checkpoint(tmp_path / "run") as source:
        assert source.path == newest
        assert "the newest of 2 whole checkpoints" in source.chosen
        assert "2 more are incomplete" in source.chosen
    named = directory / "gpt--val_loss=1.00-step=9-consumed_samples=8.0"
    with open_checkpoint(named) as source:
        assert source.path == named
        assert source.chosen is None
    assert "not written to its end" in refusal(directory / "gpt--val_loss=1.00-step=12-consumed_samples=8.0")


def test_layers_may_be_stored_one_by_one(tmp_path: Path) -> None:
    names = layer_tensors(expected(CONFIG).transformer)
    changes: dict[str, Any] = {f"decoder.layers.{name}": None for name in names}
    changes |= {f"decoder.layers.{index}.{name}": shape for index in range(2) for name, shape in names.items()}
    with open_checkpoint(write_nemo1(tmp_path / "x", **changes)) as source:
        assert source.architecture() == expected(CONFIG)


def test_our_own_archive_reads_back(tmp_path: Path) -> None:
    written = to_nemo1_config(expected(CONFIG | {"vocab_size": 48}), "32")
    with open_checkpoint(write_nemo1(tmp_path / "x", written)) as source:
        assert source.architecture() == expected(CONFIG | {"vocab_size": 48})


@pytest.mark.parametrize(
    ("config", "changes", "words"),
    [
        ({"num_layers": 3}, {}, ["num_layers: 3"]),
        ({"hidden_size": 32}, {}, [EMBEDDING, "hidden_size: 32"]),
        ({"ffn_hidden_size": 32}, {}, ["linear_fc1.weight", "ffn_hidden_size: 32"]),
        ({"num_query_groups": 1}, {}, ["linear_qkv.weight", "num_query_groups: 1"]),
        ({"bias": True}, {}, ["bias", "add_bias_linear: True"]),
        ({"qkv_bias": True}, {}, ["linear_qkv.bias", "add_qkv_bias: True"]),
        ({"activation": "gelu"}, {}, ["linear_fc1.weight", "gated_linear_unit: False"]),
        ({"normalization": "layernorm"}, {}, ["layernorm.bias", "normalization: LayerNorm"]),
        ({"qk_layernorm": True}, {}, ["q_layernorm.weight", "qk_layernorm"]),
        ({"share_embeddings_and_output_weights": True}, {}, ["output_layer.weight", "share_embeddings"]),
        ({}, {"output_layer.weight": (60, 16)}, ["output_layer.weight", "[60, 16]"]),
        ({}, {"output_layer.weight": None}, ["output_layer.weight", "share_embeddings"]),
        ({}, {"rm_head.weight": (1, 16)}, ["rm_head.weight"]),
        ({}, {EMBEDDING: None}, [EMBEDDING, "adapters"]),
        ({}, {"dtype": torch.float8_e4m3fn}, ["float8_e4m3fn"]),
    ],
)
def test_tensors_that_contradict_the_configuration(tmp_path: Path, config: dict, changes: dict, words: list) -> None:
    message = refusal(write_nemo1(tmp_path / "x", CONFIG | config, **changes))
    assert all(word in message for word in words), message


def damaged(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / "ckpt"
    if kind == "missing":
        return path
    if kind == "empty directory":
        path.mkdir()
    elif kind == "text file":
        path.write_text("hello " * 1000)
    elif kind == "hugging face":
        path.mkdir()
        (path / "config.json").write_text("{}")
    elif kind == "weights without configuration":
        write_metadata(path, expected(CONFIG))
    elif kind == "another tar":
        with tarfile.open(path, "w") as tar:
            tar.addfile(tarfile.TarInfo("readme"), io.BytesIO())
    elif kind == "truncated archive":
        files = write_nemo1(tmp_path / "files")
        (files / "model_weights" / SHARD).write_bytes(bytes(100_000))
        pack(files, path)
        os.truncate(path, path.stat().st_size - 60_000)
    elif kind == "escaping":
        write_nemo1(tmp_path / "files")
        with tarfile.open(path, "w") as tar:
            tar.add(tmp_path / "files", arcname=".")
            member = tarfile.TarInfo("model_weights/../../../evil/.zarray")
            tar.addfile(member, io.BytesIO())
    elif kind == "no model.yaml":
        write_nemo2(path)
        (path / "context" / "model.yaml").unlink()
    elif kind == "code in model.yaml":
        write_nemo2(path)
        (path / "context" / "model.yaml").write_text("!!python/object/apply:os.system ['true']")
    else:
        write_nemo1(path)
        weights = path / "model_weights"
        if kind == "no .metadata":
            (weights / ".metadata").unlink()
        elif kind == "no shard":
            (weights / SHARD).unlink()
        elif kind == "truncated shard":
            (weights / SHARD).write_bytes(bytes(100))
        elif kind == "no metadata.json":
            (weights / "metadata.json").unlink()
        elif kind == "zarr":
            (weights / ".metadata").unlink()
            (weights / "model.output_layer.weight").mkdir()
            (weights / "model.output_layer.weight" / ".zarray").write_text("{}")
        elif kind == "other backend":
            (weights / "metadata.json").write_text('{"sharded_backend": "fsdp_dtensor"}')
        elif kind == "broken .metadata":
            (weights / ".metadata").write_bytes(b"\x80\x04nonsense")
        elif kind == "code in .metadata":
            (weights / ".metadata").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "run").encode() + b"'\ntR.")
        elif kind == "broken yaml":
            (path / "model_config.yaml").write_text("a: [")
        elif kind == "pre-mcore":
            for file in weights.iterdir():
                file.unlink()
            (path / "mp_rank_00").mkdir()
            (path / "mp_rank_00" / "model_weights.ckpt").write_bytes(b"")
    return path


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "There is no checkpoint at"),
        ("empty directory", "is a directory, but no checkpoint"),
        ("text file", "not a tar archive"),
        ("hugging face", "model_type: None, which is not read directly"),
        ("weights without configuration", "no configuration of the model"),
        ("another tar", "no model_config.yaml"),
        ("truncated archive", "truncated"),
        ("truncated shard", "__0_0.distcp is truncated (100 bytes, at least 4096 are needed)"),
        ("no shard", "__0_0.distcp is missing"),
        ("escaping", "unsafe member"),
        ("no model.yaml", "context/model.yaml"),
        ("code in model.yaml", "plain data"),
        ("no .metadata", ".metadata is missing"),
        ("no metadata.json", "metadata.json is missing"),
        ("zarr", "model.output_layer.weight/.zarray does not describe an array"),
        ("other backend", "fsdp_dtensor"),
        ("broken .metadata", "cannot be read"),
        ("code in .metadata", "system"),
        ("broken yaml", "model_config.yaml cannot be read"),
        ("pre-mcore", "convert_gpt_nemo_to_mcore.py"),
    ],
)
def test_paths_that_are_no_usable_checkpoint(tmp_path: Path, kind: str, words: str) -> None:
    path = damaged(tmp_path, kind)
    before = set(tmp_path.rglob("*"))
    message = refusal(path)
    assert words in message
    assert str(path) in message
    assert set(tmp_path.rglob("*")) == before
