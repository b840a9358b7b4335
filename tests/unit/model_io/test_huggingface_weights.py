"""Weights of Hugging Face directories: read whole and by region, written, and read by transformers again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_models import MODELS, ROWS, token_ids, write
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemo_spin.errors import CheckpointError
from nemo_spin.megatron.architecture import Architecture
from nemo_spin.model_io.contradictions import check_against
from nemo_spin.model_io.huggingface.config import architecture_from_huggingface, read_huggingface_config
from nemo_spin.model_io.huggingface.export import write_huggingface_config, write_huggingface_weights
from nemo_spin.model_io.huggingface.weights import HuggingFaceStore
from nemo_spin.model_io.stores.interface import EMBEDDING, OUTPUT_LAYER, Region, StoredTensor


def open_store(directory: Path) -> tuple[HuggingFaceStore, Architecture]:
    architecture = architecture_from_huggingface(read_huggingface_config(directory, "it"), "it: config.json")
    return HuggingFaceStore(directory, architecture, "it"), architecture


def all_tensors(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


class Padded:
    """A store whose vocabulary has rows of padding."""

    def __init__(self, store: HuggingFaceStore, rows: int) -> None:
        self.store, self.rows = store, rows
        self.tensors = {
            name: StoredTensor((stored.shape[0] + self._more(name), *stored.shape[1:]), stored.dtype)
            for name, stored in store.tensors.items()
        }

    def _more(self, name: str) -> int:
        return self.rows if name in (EMBEDDING, OUTPUT_LAYER) else 0

    def read(self, name: str, region: Region | None = None) -> Tensor:
        tensor = self.store.read(name)
        tensor = torch.cat([tensor, torch.full((self._more(name), *tensor.shape[1:]), torch.nan)])
        return tensor if region is None else tensor[region]


@pytest.mark.parametrize("name", MODELS)
def test_round_trip(tmp_path: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM

    expected = write(tmp_path / "theirs", name)
    store, architecture = open_store(tmp_path / "theirs")
    padded = replace(architecture, vocab_rows=ROWS + 6)
    ours = tmp_path / "ours"
    ours.mkdir()
    write_huggingface_weights(Padded(store, 6), padded, ours, max_shard_bytes=20_000)
    write_huggingface_config(padded, torch.float32, ours, bos_token_id=1, eos_token_id=2)

    before, after = all_tensors(tmp_path / "theirs"), all_tensors(ours)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    again, _ = open_store(ours)
    assert again.tensors == store.tensors
    model, loading = AutoModelForCausalLM.from_pretrained(ours, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    with torch.no_grad():
        # the same weights at other addresses: the last bits may differ
        torch.testing.assert_close(model.eval()(token_ids()).logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["llama2", "llama-mqa", "llama-biases", "qwen3"])
def test_a_region_is_a_slice_of_the_whole(tmp_path: Path, name: str) -> None:
    write(tmp_path, name, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    store, _ = open_store(tmp_path)
    generator = torch.Generator().manual_seed(0)
    for tensor, stored in store.tensors.items():
        whole = store.read(tensor)
        assert whole.shape == stored.shape and whole.dtype == stored.dtype
        for _ in range(5):
            ends = [sorted(torch.randint(0, size + 1, (2,), generator=generator).tolist()) for size in stored.shape]
            region = tuple(slice(start, stop) for start, stop in ends)
            assert torch.equal(store.read(tensor, region), whole[region])
        kept = whole.clone()
        whole.zero_()
        assert torch.equal(store.read(tensor), kept)


def test_qkv_and_gate_lie_where_megatron_core_wants_them(tmp_path: Path) -> None:
    write(tmp_path, "llama31")
    store, architecture = open_store(tmp_path)
    theirs = {name.removeprefix("model.layers.1."): tensor for name, tensor in all_tensors(tmp_path).items()}
    qkv = store.read("decoder.layers.1.self_attention.linear_qkv.weight").view(2, 4, 8, 32)
    query, key, value = (theirs[f"self_attn.{which}_proj.weight"] for which in "qkv")
    assert torch.equal(qkv[:, :2].reshape(4 * 8, 32), query)
    assert torch.equal(qkv[:, 2].reshape(2 * 8, 32), key)
    assert torch.equal(qkv[:, 3].reshape(2 * 8, 32), value)
    gate, up = store.read("decoder.layers.1.mlp.linear_fc1.weight").chunk(2)
    assert torch.equal(gate, theirs["mlp.gate_proj.weight"]) and torch.equal(up, theirs["mlp.up_proj.weight"])
    check_against(store.tensors, architecture, "it")


def test_processes_share_the_files(tmp_path: Path) -> None:
    write(tmp_path / "theirs", "llama2")
    store, architecture = open_store(tmp_path / "theirs")

    def written(place: str, part: int, parts: int) -> dict[str, bytes]:
        (tmp_path / place).mkdir()
        write_huggingface_weights(store, architecture, tmp_path / place, max_shard_bytes=20_000, part=part, parts=parts)
        return {path.name: path.read_bytes() for path in (tmp_path / place).iterdir()}

    files = written("one", 0, 1)
    shares = [written(str(part), part, 3) for part in range(3)]
    assert sum(map(len, shares)) == len(files)
    assert files == shares[0] | shares[1] | shares[2]
    index = json.loads(files["model.safetensors.index.json"])
    assert set(index["weight_map"].values()) == files.keys() - {"model.safetensors.index.json"}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in all_tensors(tmp_path / "one").values())
    assert all(len(content) < 23_000 for name, content in files.items() if name.endswith(".safetensors"))


def test_others_may_read_the_files_as_the_umask_says(tmp_path: Path) -> None:
    write(tmp_path / "theirs", "llama2")
    store, architecture = open_store(tmp_path / "theirs")
    (tmp_path / "one").mkdir()
    write_huggingface_weights(store, architecture, tmp_path / "one")
    (tmp_path / "any").touch()
    assert (tmp_path / "one" / "model.safetensors").stat().st_mode == (tmp_path / "any").stat().st_mode


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    write(tmp_path, "llama2")
    store, architecture = open_store(tmp_path)
    with pytest.raises(CheckpointError, match=r"nowhere/model\.safetensors cannot be written"):
        write_huggingface_weights(store, architecture, tmp_path / "nowhere")


def test_stored_dtypes_stay(tmp_path: Path) -> None:
    write(tmp_path / "theirs", "llama32-tied")
    tensors = {name: tensor.bfloat16() for name, tensor in all_tensors(tmp_path / "theirs").items()}
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    tensors["model.layers.0.self_attn.k_proj.weight"] = tensors["model.layers.0.self_attn.k_proj.weight"].half()
    # Both are in checkpoints of other tools, and transformers reads neither.
    tensors["lm_head.weight"] = torch.zeros(ROWS, 32)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    save_file(tensors, tmp_path / "theirs" / "model.safetensors")
    store, architecture = open_store(tmp_path / "theirs")
    assert store.tensors["decoder.final_layernorm.weight"].dtype == torch.float32
    assert store.tensors["decoder.layers.0.self_attention.linear_qkv.weight"].dtype == torch.float32
    assert store.tensors["decoder.layers.1.self_attention.linear_qkv.weight"].dtype == torch.bfloat16
    (tmp_path / "ours").mkdir()
    write_huggingface_weights(store, architecture, tmp_path / "ours")
    (tmp_path / "ours" / "model.safetensors").replace(tmp_path / "ours.safetensors")
    written = load_file(tmp_path / "ours.safetensors")
    assert written.keys() == tensors.keys() - {"lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"}
    assert all(torch.equal(written[name], tensors[name].to(written[name].dtype)) for name in written)
    assert written["model.layers.1.mlp.up_proj.weight"].dtype == torch.bfloat16


def test_a_tied_weight_may_have_its_other_name(tmp_path: Path) -> None:
    write(tmp_path, "llama32-tied")
    before, _ = open_store(tmp_path)
    expected = before.read(EMBEDDING)
    edit(lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}))(tmp_path)
    store, _ = open_store(tmp_path)
    assert store.tensors == before.tensors
    assert torch.equal(store.read(EMBEDDING), expected)
    assert torch.equal(store.read(EMBEDDING, (slice(3, 9), slice(0, 5))), expected[3:9, :5])


def edit(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def changed(directory: Path) -> None:
        tensors = all_tensors(directory)
        change(tensors)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})

    return changed


def rename(directory: Path, name: str) -> None:
    (directory / "model.safetensors").rename(directory / name)


def truncate(directory: Path) -> None:
    content = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(content[: len(content) // 2])


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (edit(lambda t: t.pop(UP)), f"no tensor {UP}, .*num_hidden_layers: 2, .*intermediate_size: 48"),
        (edit(lambda t: t.pop("lm_head.weight")), "no tensor lm_head.weight, .*tie_word_embeddings: False"),
        (edit(lambda t: t.update({UP: t[UP][1:]})), rf"tensor {UP} is \[47, 32\], but .*\[48, 32\]"),
        (edit(lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn)})), f"stores {UP} as F8_E4M3"),
        (edit(lambda t: t.update({UP: t[UP].to(torch.int8)})), f"stores {UP} as I8"),
        (
            edit(lambda t: t.update({"model.layers.2.mlp.up_proj.weight": t[UP].clone()})),
            r"holds a tensor model.layers.2.mlp.up_proj.weight .*num_hidden_layers: 2",
        ),
        (edit(lambda t: t.update({"score.weight": t[UP].clone()})), "holds a tensor score.weight"),
        (truncate, "model.safetensors is truncated or damaged"),
        (
            lambda d: (d / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
            "git lfs pull",
        ),
        (lambda d: rename(d, "pytorch_model.bin"), "re-save it as safetensors"),
        (lambda d: rename(d, "model-00001-of-00002.safetensors"), "model.safetensors.index.json is there"),
        (lambda d: (d / "model.safetensors").unlink(), "no weights"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: Callable[[Path], Any], words: str) -> None:
    write(tmp_path, "llama2")
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=words):
        open_store(tmp_path)


def test_damage_of_many_files_is_named(tmp_path: Path) -> None:
    write(tmp_path / "whole", "llama2", max_shard_size="20KB")
    index = "model.safetensors.index.json"
    one = sorted((tmp_path / "whole").glob("*.safetensors"))[1].name
    shutil.copytree(tmp_path / "whole", tmp_path / "missing")
    (tmp_path / "missing" / one).unlink()
    with pytest.raises(CheckpointError, match=f"{one} is missing, which {index} names"):
        open_store(tmp_path / "missing")
    shutil.copytree(tmp_path / "whole", tmp_path / "swapped")
    tensors = load_file(tmp_path / "swapped" / one)
    moved = next(iter(tensors))
    save_file({name: tensor for name, tensor in tensors.items() if name != moved}, tmp_path / "swapped" / one)
    with pytest.raises(CheckpointError, match=f"{one} holds {moved}; it does not"):
        open_store(tmp_path / "swapped")
    (tmp_path / "swapped" / index).write_text("{}")
    with pytest.raises(CheckpointError, match=f"{index} cannot be read"):
        open_store(tmp_path / "swapped")
