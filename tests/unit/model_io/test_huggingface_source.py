"""Opening a Hugging Face directory, or a model of the hub's cache."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_models import ROWS, write

from nemo_spin.errors import CheckpointError
from nemo_spin.model_io.huggingface.source import is_huggingface_directory, open_huggingface_directory


def test_a_directory(tmp_path: Path) -> None:
    assert not is_huggingface_directory(tmp_path)
    write(tmp_path, "qwen2")
    assert is_huggingface_directory(tmp_path)
    source = open_huggingface_directory(tmp_path)
    assert (source.family, source.layout, source.path, source.chosen) == ("huggingface", "safetensors", tmp_path, None)
    architecture = source.architecture(vocab_size=7)
    assert (architecture.vocab_size, architecture.vocab_rows) == (ROWS, ROWS)
    assert source.tokenizer is None
    assert source.weights().read("decoder.final_layernorm.weight").dtype == torch.float32
    (tmp_path / "tokenizer.json").write_text("{}")
    assert open_huggingface_directory(tmp_path).tokenizer.library == "huggingface"


def test_the_hub_s_cache(tmp_path: Path) -> None:
    root = tmp_path / "models--somebody--llama"
    write(root / "snapshots" / "0abc", "llama2")
    shutil.copytree(root / "snapshots" / "0abc", root / "snapshots" / "0def")
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("0abc")
    assert is_huggingface_directory(root)
    source = open_huggingface_directory(root)
    assert source.path == root / "snapshots" / "0abc"
    assert source.chosen.startswith("0abc is used")


def test_an_adapter_and_an_unknown_model_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba2"}))
    with pytest.raises(CheckpointError, match="mamba2, which is not read directly"):
        open_huggingface_directory(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "adapter_config.json").write_text("{}")
    assert is_huggingface_directory(tmp_path)
    with pytest.raises(CheckpointError, match="adapter"):
        open_huggingface_directory(tmp_path)
