"""Directories as Megatron-LM and Megatron-Bridge write them, and the ones written for them."""

from __future__ import annotations

import argparse
import enum
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from harness import Workers
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from test_architectures import GROUPS, HEADS, HIDDEN, ROWS, SIZES, difference
from test_checkpoints import VARIANTS, last, logits
from torch import Tensor
from toy import fill_deterministically, toy_architecture

from nemo_spin.megatron.architecture import Architecture
from nemo_spin.megatron.gpt import build_gpt
from nemo_spin.model_io.megatron_lm.args import architecture_from_args, to_args
from nemo_spin.model_io.megatron_lm.bridge import architecture_from_run_config, to_run_config
from nemo_spin.model_io.megatron_lm.directory import (
    find_iteration,
    iteration_directory,
    write_megatron_directory,
)
from nemo_spin.model_io.megatron_lm.source import open_megatron_iteration
from nemo_spin.model_io.stores.interface import EMBEDDING, StoredTensor
from nemo_spin.model_io.stores.torch_dist import write_torch_dist
from nemo_spin.model_io.untrusted.metadata_pickle import read_metadata
from nemo_spin.model_io.weights import load_weights, save_weights

ARCHITECTURES = {"llama": toy_architecture(), **VARIANTS}


def run_args(architecture: Architecture) -> argparse.Namespace:
    """As a run stores them: besides the architecture, objects of its own code, which is gone when they are read."""
    gone = types.ModuleType("a_training_code")
    gone.Schedule = type("Schedule", (), {"__module__": gone.__name__})
    gone.Mode = enum.Enum("Mode", {"fast": 1}, module=gone.__name__)
    sys.modules[gone.__name__] = gone
    schedule = gone.Schedule()
    schedule.steps = [1, 2]
    return argparse.Namespace(
        **to_args(architecture, torch.float32),
        schedule=schedule,
        mode=gone.Mode.fast,
        init_method=torch.nn.init.normal_,
    )


def save_run(architecture: Architecture, root: Path, ids: Tensor, family: str, one_by_one: bool) -> Any:
    model = build_gpt(architecture, "32")
    fill_deterministically(model)
    weights = model.sharded_state_dict(metadata={"non_homogeneous_layers": one_by_one})
    weights = {name: entry for name, entry in weights.items() if not name.endswith("_extra_state")}
    rank, size = dist.get_rank(), dist.get_world_size()
    state: dict[str, Any] = {
        "model": weights,
        "optimizer": {
            name: ShardedTensor.from_rank_offsets(f"optimizer.state.exp_avg.{name}.{rank}", torch.ones(3))
            for name in ("decoder.final_layernorm.weight", "embedding.word_embeddings.weight")
        },
        "rng_state": ShardedObject("rng_state", {"random_rng_state": 7}, (size,), (rank,)),
        "checkpoint_version": 3.0,
        "iteration": 7,
    }
    iteration = root / "iter_0000007"
    if rank == 0:
        iteration.mkdir(parents=True)
    if family == "megatron":
        state["args"] = run_args(architecture)
    elif rank == 0:
        config = to_run_config(architecture, torch.float32, None)
        (iteration / "run_config.yaml").write_text(yaml.safe_dump(config))
    dist.barrier()
    dist_checkpointing.save(state, str(iteration))
    sys.modules.pop("a_training_code", None)
    if rank == 0:
        (root / "latest_checkpointed_iteration.txt").write_text("7")
    found = logits(model, ids)
    return None if found is None else found[..., : architecture.vocab_rows]


def load_run(root: Path, ids: Tensor) -> Any:
    found = find_iteration(root)
    assert found is not None
    source = open_megatron_iteration(found)
    architecture = source.architecture()
    model = build_gpt(architecture, "32")
    load_weights(model, source.weights(), str(source.path))
    computed = logits(model, ids)
    return source.family, architecture, None if computed is None else computed[..., : architecture.vocab_rows]


@pytest.mark.parametrize("one_by_one", [False, True], ids=["stacked", "one by one"])
@pytest.mark.parametrize("family", ["megatron", "bridge"])
def test_a_run_opens_at_another_layout(workers: Workers, tmp_path: Path, family: str, one_by_one: bool) -> None:
    ids = torch.arange(20).reshape(2, 10)
    # Megatron stores the rows that its layout pads the vocabulary to.
    architecture = replace(ARCHITECTURES["qk-layernorm"], vocab_rows=252)
    saved = last(workers.run(save_run, architecture, tmp_path, ids, family, one_by_one, tp=2, pp=2))
    for tp, pp in ((1, 1), (2, 1), (1, 2)):
        results = workers.run(load_run, tmp_path, ids, tp=tp, pp=pp)
        assert {result[0] for result in results} == {family}
        assert [result[1] for result in results] == [architecture] * len(results)
        torch.testing.assert_close(last([result[2] for result in results]), saved, rtol=0, atol=1e-5)


def write_again(root: Path, copy: Path) -> None:
    source = open_megatron_iteration(find_iteration(root))
    architecture = source.architecture()
    iteration = iteration_directory(copy)
    write_torch_dist(source.weights(), iteration, "")
    write_megatron_directory(copy, architecture, torch.float32)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_written_opens_again(workers: Workers, tmp_path: Path, name: str) -> None:
    ids = torch.arange(20).reshape(2, 10)
    saved = last(workers.run(save_run, ARCHITECTURES[name], tmp_path / "run", ids, "megatron", False))
    write_again(tmp_path / "run", tmp_path / "copy")
    family, architecture, loaded = workers.run(load_run, tmp_path / "copy", ids)[0]
    assert (family, architecture) == ("bridge", ARCHITECTURES[name])
    assert torch.equal(loaded, saved)
    # Without Megatron-Bridge's file, what is written for Megatron-LM counts.
    (iteration_directory(tmp_path / "copy") / "run_config.yaml").unlink()
    family, architecture, loaded = workers.run(load_run, tmp_path / "copy", ids)[0]
    assert (family, architecture) == ("megatron", ARCHITECTURES[name])
    assert torch.equal(loaded, saved)


def load_with_megatron_core(architecture: Architecture, iteration: Path, ids: Tensor) -> Any:
    """As Megatron-LM and Megatron-Bridge do: all that the model asks for has to be there."""
    model = build_gpt(architecture, "32")
    state = {"model": model.sharded_state_dict()}
    asked = {entry.key for entry in state["model"].values() if isinstance(entry, ShardedObject)}
    loaded = dist_checkpointing.load(state, str(iteration))
    model.load_state_dict(loaded["model"])
    found = logits(model, ids)
    return asked, None if found is None else found[..., : architecture.vocab_rows]


def save_from_model(architecture: Architecture, iteration: Path, ids: Tensor) -> Any:
    model = build_gpt(architecture, "32")
    fill_deterministically(model)
    save_weights(model, iteration, architecture.vocab_rows, prefix="")
    found = logits(model, ids)
    return None if found is None else found[..., : architecture.vocab_rows]


def test_megatron_core_loads_what_a_run_writes(workers: Workers, tmp_path: Path) -> None:
    ids = torch.arange(20).reshape(2, 10)
    architecture = ARCHITECTURES["qk-layernorm"]
    saved = last(workers.run(save_from_model, architecture, tmp_path, ids, tp=2, pp=2))
    loaded = workers.run(load_with_megatron_core, architecture, tmp_path, ids, tp=1, pp=2)
    torch.testing.assert_close(last([result[1] for result in loaded]), saved, rtol=0, atol=1e-5)
    keys = read_metadata(tmp_path / ".metadata", "it").state_dict_metadata
    assert "decoder.layers.self_attention.core_attention._extra_state/shard_3_4" in keys
    assert "decoder.layers.self_attention.q_layernorm._extra_state/shard_0_4" in keys


@pytest.mark.parametrize("name", ["qk-layernorm", "gpt2-like"])
def test_megatron_core_loads_what_is_written(workers: Workers, tmp_path: Path, name: str) -> None:
    ids = torch.arange(20).reshape(2, 10)
    saved = last(workers.run(save_run, ARCHITECTURES[name], tmp_path / "run", ids, "megatron", False))
    write_again(tmp_path / "run", tmp_path / "copy")
    iteration = iteration_directory(tmp_path / "copy")
    for pp in (1, 2):
        results = workers.run(load_with_megatron_core, ARCHITECTURES[name], iteration, ids, pp=pp)
        assert "decoder.layers.mlp.linear_fc1._extra_state" in results[0][0]
        assert torch.equal(last([result[1] for result in results]), saved)


TENSORS = {EMBEDDING: StoredTensor((ROWS, HIDDEN), torch.float32)}
ARGS = {
    "num_layers": 2,
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "group_query_attention": True,
    "num_query_groups": GROUPS,
    "ffn_hidden_size": 48,
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-6,
    "swiglu": True,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "bias_gelu_fusion": False,
    "position_embedding_type": "rope",
    "untie_embeddings_and_output_weights": True,
    "max_position_embeddings": 64,
}


def rope(**more: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **more}}


def llama31() -> tuple[Any, Architecture]:
    from transformers import LlamaConfig, LlamaForCausalLM

    scaled = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = LlamaConfig(**SIZES, **rope(**scaled, original_max_position_embeddings=8192), rms_norm_eps=1e-6)
    return LlamaForCausalLM(config), architecture_from_args(ARGS | {"use_rope_scaling": True}, TENSORS, ROWS, "it")


def qwen2() -> tuple[Any, Architecture]:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(**SIZES, **rope(rope_theta=1e6), rms_norm_eps=1e-6, tie_word_embeddings=True)
    args = {"add_qkv_bias": True, "rotary_base": 1000000, "untie_embeddings_and_output_weights": False}
    return Qwen2ForCausalLM(config), architecture_from_args(ARGS | args, TENSORS, ROWS, "it")


def qwen3() -> tuple[Any, Architecture]:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(**SIZES, **rope(), head_dim=16)
    return Qwen3ForCausalLM(config), architecture_from_args(
        ARGS | {"qk_layernorm": True, "kv_channels": 16}, TENSORS, ROWS, "it"
    )


def nemotron() -> tuple[Any, Architecture]:
    from transformers import NemotronConfig, NemotronForCausalLM

    config = NemotronConfig(**SIZES, **rope(partial_rotary_factor=0.5), head_dim=8, norm_eps=1e-5, hidden_act="relu2")
    args = {
        "swiglu": False,
        "squared_relu": True,
        "normalization": "LayerNorm",
        "apply_layernorm_1p": True,
        "norm_epsilon": 1e-5,
        "rotary_percent": 0.5,
    }
    return NemotronForCausalLM(config), architecture_from_args(ARGS | args, TENSORS, ROWS, "it")


def llama32_of_bridge() -> tuple[Any, Architecture]:
    from transformers import LlamaConfig, LlamaForCausalLM

    scaled = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = LlamaConfig(**SIZES, **rope(**scaled, original_max_position_embeddings=8192), rms_norm_eps=1e-6)
    model = {
        "_target_": "megatron.bridge.models.llama.llama_provider.Llama32ModelProvider1B",
        "num_layers": 2,
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_query_groups": GROUPS,
        "ffn_hidden_size": 48,
        "normalization": "RMSNorm",
        "layernorm_epsilon": 1e-6,
        "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": False,
        "rope_scaling": True,
        "rope_scaling_factor": 32.0,
        "seq_length": 64,
    }
    return LlamaForCausalLM(config), architecture_from_run_config({"model": model}, TENSORS, ROWS, "it")


@pytest.mark.parametrize("make", [llama31, qwen2, qwen3, nemotron, llama32_of_bridge])
def test_logits_are_those_of_transformers(workers: Workers, tmp_path: Path, make: Any) -> None:
    assert workers.run(difference, make, tmp_path)[0] < 1e-4
