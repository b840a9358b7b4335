from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from nemo_spin.errors import CheckpointError
from nemo_spin.model_io.megatron_lm.args import architecture_from_args
from nemo_spin.model_io.megatron_lm.bridge import architecture_from_run_config
from nemo_spin.model_io.megatron_lm.directory import find_iteration, iteration_directory, write_megatron_directory
from nemo_spin.model_io.megatron_lm.tokenizer import from_megatron
from nemo_spin.model_io.stores.common_state import read_common_state
from nemo_spin.model_io.stores.interface import EMBEDDING, StoredTensor

TENSORS = {EMBEDDING: StoredTensor((384, 64), torch.bfloat16)}
LLAMA = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "group_query_attention": True,
    "num_query_groups": 2,
    "swiglu": True,
    "add_bias_linear": False,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "use_rope_scaling": True,
    "max_position_embeddings": 128,
    "vocab_size": 372,
    "untie_embeddings_and_output_weights": True,
}


def make(directory: Path, *, whole: bool = True, backend: str = "torch_dist") -> Path:
    directory.mkdir(parents=True)
    (directory / "common.pt").touch()
    if whole:
        (directory / "metadata.json").write_text(json.dumps({"sharded_backend": backend}))
        if backend == "zarr":
            (directory / "a.weight").mkdir()
            (directory / "a.weight" / ".zarray").touch()
        else:
            (directory / ".metadata").touch()
    return directory


def track(root: Path, text: str) -> None:
    (root / "latest_checkpointed_iteration.txt").write_text(text)


def test_the_iteration_that_the_tracker_names(tmp_path: Path) -> None:
    make(tmp_path / "iter_0000500")
    named = make(tmp_path / "iter_0001000")
    make(tmp_path / "iter_0001500")
    track(tmp_path, "1000\n")
    found = find_iteration(tmp_path)
    assert found.path == named
    assert found.notice == "iter_0001000 is used (of 3): latest_checkpointed_iteration.txt names it."
    assert find_iteration(named).path == named
    assert find_iteration(named).notice is None
    renamed = named.rename(tmp_path / "my_model")
    assert find_iteration(renamed).path == renamed


def test_weights_without_a_run(tmp_path: Path) -> None:
    release = make(tmp_path / "release")
    track(tmp_path, "release")
    assert find_iteration(tmp_path).path == release
    assert find_iteration(release).path == release


@pytest.mark.parametrize(
    ("tracked", "reason"),
    [
        ("3000", "iter_0003000, which latest_checkpointed_iteration.txt names, is incomplete"),
        ("9", "iter_0000009, which latest_checkpointed_iteration.txt names, is not there"),
        ("no number", "latest_checkpointed_iteration.txt is missing or names none"),
        (None, "latest_checkpointed_iteration.txt is missing or names none"),
    ],
)
def test_the_newest_whole_one_where_the_tracker_does_not_help(tmp_path: Path, tracked: str | None, reason: str) -> None:
    make(tmp_path / "iter_0001000")
    newest = make(tmp_path / "iter_0002000", backend="zarr")
    make(tmp_path / "iter_0003000", whole=False)
    (tmp_path / "iter_0003000" / ".metadata").touch()
    make(tmp_path / "release")
    if tracked is not None:
        track(tmp_path, tracked)
    found = find_iteration(tmp_path)
    assert found.path == newest
    assert found.notice == f"iter_0002000 is used, the newest of 3 whole in {tmp_path}: {reason}."


def test_no_whole_iteration(tmp_path: Path) -> None:
    assert find_iteration(tmp_path) is None
    half = make(tmp_path / "iter_0000010", whole=False)
    for path, words in ((tmp_path, "holds no whole iteration"), (half, "not written to its end")):
        with pytest.raises(CheckpointError, match=words):
            find_iteration(path)


def test_formats_that_cannot_be_read(tmp_path: Path) -> None:
    torch_format = tmp_path / "old" / "iter_0000100"
    (torch_format / "mp_rank_00").mkdir(parents=True)
    (torch_format / "mp_rank_00" / "model_optim_rng.pt").touch()
    # An older iteration that could be read is no reason to take it silently.
    make(tmp_path / "old" / "iter_0000050")
    track(tmp_path / "old", "100")
    dcp = tmp_path / "dcp" / "iter_0000100"
    dcp.mkdir(parents=True)
    (dcp / ".metadata").touch()
    for path, words in (
        (tmp_path / "old", "--ckpt-convert-format torch_dist"),
        (torch_format, "--ckpt-convert-format torch_dist"),
        (tmp_path / "dcp", "fsdp_dtensor"),
        (dcp, "fsdp_dtensor"),
    ):
        with pytest.raises(CheckpointError, match=words):
            find_iteration(path)


def test_what_is_written_beside_the_weights(tmp_path: Path) -> None:
    architecture = architecture_from_args(LLAMA, TENSORS, None, "args")
    root, final = tmp_path / "run.partial", tmp_path / "run"
    (iteration_directory(root) / "tokenizer").mkdir(parents=True)
    (iteration_directory(root) / "tokenizer" / "tokenizer_config.json").write_text("{}")
    write_megatron_directory(root, architecture, torch.bfloat16, ("huggingface", "tokenizer"), final)
    root.rename(final)
    iteration = iteration_directory(final)
    assert sorted(path.name for path in final.iterdir()) == [
        "iter_0000001",
        "latest_checkpointed_iteration.txt",
        "latest_train_state.pt",
    ]
    state = read_common_state(iteration, "it")
    assert (state["iteration"], state["checkpoint_version"]) == (1, 3.0)
    assert architecture_from_args(state["args"], TENSORS, None, "args") == architecture
    config = yaml.safe_load((iteration / "run_config.yaml").read_text())
    assert architecture_from_run_config(config, TENSORS, None, "run_config.yaml") == architecture
    for described in (state["args"], config["tokenizer"]):
        assert described["tokenizer_model"] == str(iteration / "tokenizer")
        found = from_megatron(described, iteration, "it")
        assert (found.library, found.source) == ("huggingface", "tokenizer")
    # Both readers open them without trusting them.
    torch.load(iteration / "train_state.pt", weights_only=True)
    with torch.serialization.safe_globals([__import__("argparse").Namespace]):
        torch.load(iteration / "common.pt", weights_only=True)


@pytest.mark.parametrize(
    ("fields", "files", "expected"),
    [
        ({"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "org/name"}, (), ("huggingface", "org/name")),
        (
            {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "/gone"},
            ("tokenizer_config.json",),
            ("huggingface", "tokenizer"),
        ),
        (
            {"tokenizer_type": "GPTSentencePieceTokenizer", "tokenizer_model": "/gone.model"},
            ("tokenizer.model",),
            ("sentencepiece", "tokenizer/tokenizer.model"),
        ),
        (
            {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": "/gone/my.model"},
            ("my.model", "tokenizer.model"),
            ("sentencepiece", "tokenizer/my.model"),
        ),
        ({"tokenizer_type": "Llama2Tokenizer", "tokenizer_model": "/a.model"}, (), ("sentencepiece", "/a.model")),
        ({"tokenizer_type": "TikTokenizer", "tokenizer_model": "/a.json"}, (), ("tiktoken", "/a.json")),
        ({"tokenizer_type": "GPT2BPETokenizer", "vocab_file": "v"}, (), ("GPT2BPETokenizer", None)),
        ({"tokenizer_type": "NullTokenizer", "vocab_size": 5}, (), None),
        ({"tokenizer_type": None}, (), None),
        (None, (), None),
    ],
)
def test_tokenizers(tmp_path: Path, fields: dict | None, files: tuple[str, ...], expected: tuple | None) -> None:
    (tmp_path / "tokenizer").mkdir()
    for name in files:
        (tmp_path / "tokenizer" / name).touch()
    found = from_megatron(fields, tmp_path, "it")
    assert (found and (found.library, found.source)) == expected


def test_how_a_tokenizer_is_built(tmp_path: Path) -> None:
    old = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "x", "hf_tokenizer_kwargs": {"use_fast": False}}
    new = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "x", "tokenizer_hf_no_use_fast": True}
    assert not from_megatron(old, tmp_path, "it").use_fast
    assert not from_megatron(new, tmp_path, "it").use_fast
    legacy = {
        "tokenizer_type": "SentencePieceTokenizer",
        "tokenizer_model": "x",
        "sp_tokenizer_kwargs": {"legacy": True},
    }
    assert from_megatron(legacy, tmp_path, "it").legacy
