"""NeMo 2's `context/`, against this project's reader and against what NeMo 2's own writer makes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml

from nemo_spin.errors import CheckpointError
from nemo_spin.megatron.architecture import Architecture, gelu_tanh, quick_gelu, squared_relu, transformer_fields
from nemo_spin.model_io.nemo2.config import architecture_from_nemo2
from nemo_spin.model_io.nemo2.context import write_context
from nemo_spin.model_io.nemo2.fiddle_graph import fiddle_graph
from nemo_spin.model_io.stores.interface import EMBEDDING, StoredTensor

CHECKPOINTS = Path(__file__).resolve().parents[3] / "shared" / "checkpoints"
if not CHECKPOINTS.is_dir():
    CHECKPOINTS = Path(__file__).resolve().parents[4] / "shared" / "checkpoints"
LLAMA = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 160,
    "kv_channels": 32,
    "normalization": "RMSNorm",
    "layernorm_epsilon": 1e-6,
    "layernorm_zero_centered_gamma": False,
    "activation_func": F.silu,
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "rotary_interleaved": False,
    "softmax_scale": None,
}
NEMOTRON = {
    "normalization": "LayerNorm",
    "layernorm_zero_centered_gamma": True,
    "activation_func": squared_relu,
    "gated_linear_unit": False,
}


def architecture(**overrides: Any) -> Architecture:
    """A Llama of 384 rows; overrides are fields of the architecture or of its transformer."""
    outer = {"vocab_rows": 384, "vocab_size": 384, "max_sequence_length": 256, "position_embedding_type": "rope"}
    outer |= {key: value for key, value in overrides.items() if key not in LLAMA}
    return Architecture(
        transformer=transformer_fields(**{key: overrides.get(key, LLAMA[key]) for key in LLAMA}), **outer
    )


def written(found: Architecture, directory: Path, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """model.yaml of the architecture, after it was read back as the same one."""
    write_context(directory, found, dtype, None)
    model = yaml.safe_load((directory / "model.yaml").read_text())
    tensors = {EMBEDDING: StoredTensor((found.vocab_rows, found.transformer["hidden_size"]), dtype)}
    assert architecture_from_nemo2(model, tensors, found.vocab_size, "model.yaml") == found
    return model


@pytest.mark.parametrize(
    ("overrides", "classes"),
    [
        ({}, "llama.LlamaModel llama.LlamaConfig"),
        ({"share_embeddings_and_output_weights": True, "rotary_base": 5e5}, "llama.LlamaModel llama.LlamaConfig"),
        ({"rope_scaling": True, "rope_scaling_factor": 32.0}, "llama.LlamaModel llama.Llama31Config"),
        # Only this class scales rotary embeddings; what else it computes is in the fields.
        ({"rope_scaling": True, **NEMOTRON, "add_qkv_bias": True}, "llama.LlamaModel llama.Llama31Config"),
        ({"add_qkv_bias": True}, "qwen2.Qwen2Model qwen2.Qwen2Config"),
        ({"qk_layernorm": True}, "qwen3.Qwen3Model qwen3.Qwen3Config"),
        ({**NEMOTRON, "rotary_percent": 0.5}, "nemotron.NemotronModel nemotron.NemotronConfig"),
        ({"qk_layernorm": True, "add_qkv_bias": True}, "base.GPTModel base.GPTConfig"),
        ({"rotary_percent": 0.5}, "base.GPTModel base.GPTConfig"),
        ({"seq_len_interpolation_factor": 2.0}, "base.GPTModel base.GPTConfig"),
        ({"rotary_interleaved": True}, "base.GPTModel base.GPTConfig"),
        ({"softmax_scale": 0.1}, "base.GPTModel base.GPTConfig"),
        ({"position_embedding_type": "none"}, "base.GPTModel base.GPTConfig"),
        (
            {
                "normalization": "LayerNorm",
                "activation_func": gelu_tanh,
                "gated_linear_unit": False,
                "add_bias_linear": True,
                "num_query_groups": None,
                "position_embedding_type": "learned_absolute",
            },
            "base.GPTModel base.GPTConfig",
        ),
    ],
)
def test_the_smallest_class_of_nemo_and_the_same_architecture_back(
    tmp_path: Path, overrides: dict[str, Any], classes: str
) -> None:
    model = written(architecture(**overrides), tmp_path)
    assert [model["_target_"], model["config"]["_target_"]] == [
        f"nemo.collections.llm.gpt.model.{name}" for name in classes.split()
    ]


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", [F.silu, F.gelu, F.relu, squared_relu, quick_gelu, gelu_tanh])
def test_every_activation(tmp_path: Path, activation: Any, gated: bool) -> None:
    written(architecture(activation_func=activation, gated_linear_unit=gated), tmp_path)


def test_what_nemo_2_has_no_name_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="activation tanh has no name in NeMo 2"):
        write_context(tmp_path, architecture(activation_func=torch.tanh), torch.float32, None)
    with pytest.raises(CheckpointError, match="no models in torch"):
        write_context(tmp_path, architecture(), torch.float64, None)


@pytest.mark.parametrize(("rows", "vocab_size"), [(384, 372), (384, 384), (151936, 151665), (131, 100), (256, 200)])
@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_nemo_makes_as_many_rows_as_are_stored(
    tmp_path: Path, rows: int, vocab_size: int, tensor_parallel: int
) -> None:
    config = written(architecture(vocab_rows=rows, vocab_size=vocab_size), tmp_path)["config"]
    # NeMo 2's GPTConfig.configure_model and get_vocab_size.
    if (made := config["vocab_size"]) is None:
        multiple = config["make_vocab_size_divisible_by"] * tensor_parallel
        made = -(-vocab_size // multiple) * multiple
    assert made == rows or (tensor_parallel > 1 and rows % tensor_parallel)


@pytest.mark.parametrize(
    ("dtype", "flags"),
    [(torch.float32, (False, False)), (torch.bfloat16, (True, False)), (torch.float16, (False, True))],
)
def test_precision(tmp_path: Path, dtype: torch.dtype, flags: tuple[bool, bool]) -> None:
    config = written(architecture(), tmp_path, dtype)["config"]
    assert (config["bf16"], config["fp16"]) == flags
    assert config["params_dtype"] == {"_target_": str(dtype), "_call_": False}


def build(graph: dict[str, Any], reference: Any) -> Any:
    """What fiddle's deserialization makes of a value, with configurations as mappings with `_target_`."""
    if reference["type"] == "leaf":
        return reference["value"]
    if reference["type"] == "pyref":
        return {"_target_": f"{reference['module']}.{reference['name']}", "_call_": False}
    entry = graph["objects"][reference["key"]]
    kind = f"{entry['type']['module']}.{entry['type']['name']}"
    values = [value if isinstance(value, str) else build(graph, value) for _, value in entry["items"]]
    if kind == "fiddle._src.config.BuildableTraverserMetadata":
        return dict(zip(("fn_or_cls", "argument_names", "argument_tags", "argument_history"), values, strict=True))
    if kind == "fiddle._src.config.Config":
        metadata = build(graph, entry["metadata"])
        assert metadata["argument_tags"] == metadata["argument_history"] == {}
        return {
            "_target_": metadata["fn_or_cls"]["_target_"],
            **dict(zip(metadata["argument_names"], values, strict=True)),
        }
    if kind == "builtins.dict":
        metadata = entry["metadata"]
        keys = build(graph, metadata) if metadata["type"] == "ref" else metadata["items"]
        return dict(zip(keys, values, strict=True))
    return {"builtins.tuple": tuple, "builtins.list": list}[kind](values)


def test_io_json_says_the_same_as_model_yaml(tmp_path: Path) -> None:
    node = {"_target_": "a.Tokenizer", "special_tokens": {"bos_token": "<s>"}, "additional_special_tokens": ["<x>"]}
    write_context(tmp_path, architecture(rope_scaling=True), torch.bfloat16, node)
    graph = json.loads((tmp_path / "io.json").read_text())
    context = build(graph, graph["root"])
    assert context["_target_"] == "nemo.lightning.io.pl.TrainerContext"
    assert context["model"] == yaml.safe_load((tmp_path / "model.yaml").read_text())
    # NeMo looks for a part of the graph by these.
    paths = {path: key for key, entry in graph["objects"].items() for path in entry.get("paths", [])}
    assert {"<root>", "<root>.model", "<root>.model.config", "<root>.model.tokenizer"} <= paths.keys()
    assert build(graph, {"type": "ref", "key": paths["<root>.model.tokenizer"]}) == node
    assert set(graph["refcounts"]) == set(graph["objects"])


@pytest.mark.skipif(not CHECKPOINTS.is_dir(), reason="the genuine checkpoints are not beside the repository")
@pytest.mark.parametrize("name", ["nemo2_gpt2", "nemo2_llama"])
def test_the_graph_of_a_genuine_checkpoint_is_made_of_the_same_parts(name: str) -> None:
    genuine = json.loads((CHECKPOINTS / name / "context" / "io.json").read_text())
    # The reader above understands what NeMo wrote, and what is written of that is understood as the same.
    context = build(genuine, genuine["root"])
    again = fiddle_graph(context)
    assert build(again, again["root"]) == context
    shapes = [
        {
            (entry["type"]["name"], entry["metadata"] and entry["metadata"]["type"] == "pyref", "paths" in entry)
            for entry in graph["objects"].values()
        }
        for graph in (genuine, again)
    ]
    assert shapes[0] - {("dict", False, False)} == shapes[1] - {("dict", False, False)}
    assert _leaf_paths(genuine) == _leaf_paths(again)


def _leaf_paths(graph: dict[str, Any]) -> set[str]:
    return {
        path
        for entry in graph["objects"].values()
        for _, value in entry["items"]
        if isinstance(value, dict)
        for path in value.get("paths", [])
    }


@pytest.mark.skipif(not CHECKPOINTS.is_dir(), reason="the genuine checkpoints are not beside the repository")
@pytest.mark.parametrize(("name", "rows"), [("nemo2_gpt2", 384), ("nemo2_llama", 372), ("nemo2_sft", 372)])
def test_genuine_configurations_survive_being_rewritten(tmp_path: Path, name: str, rows: int) -> None:
    model = yaml.safe_load((CHECKPOINTS / name / "context" / "model.yaml").read_text())
    tensors = {EMBEDDING: StoredTensor((rows, 64), torch.float32)}
    again = written(architecture_from_nemo2(model, tensors, 372, "model.yaml"), tmp_path)
    assert (again["_target_"], again["config"]["_target_"]) == (model["_target_"], model["config"]["_target_"])
    assert again["config"]["vocab_size"] == model["config"]["vocab_size"]


def test_architectures_are_told_apart_by_what_is_written(tmp_path: Path) -> None:
    """The reading back above would miss a field that is neither written nor read."""
    plain = written(architecture(), tmp_path)
    for name, value in {"softmax_scale": 0.3, "rotary_interleaved": True, "layernorm_epsilon": 1e-3}.items():
        changed = architecture(**{name: value})
        assert written(changed, tmp_path)["config"][name] != plain["config"][name]
    assert written(replace(architecture(), max_sequence_length=99), tmp_path)["config"]["seq_length"] == 99
