"""NeMo 2's `context/`, written without NeMo: the description of a model that NeMo 2.7 builds its own model of.

model.yaml is what other tools read; io.json says the same as a graph of fiddle, NeMo 2's library of configurations,
and is what NeMo itself loads. Both are made of one description, in which a Python object is a mapping with `_target_`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml

from nemo_spin.errors import CheckpointError
from nemo_spin.megatron.architecture import Architecture, gelu_tanh, squared_relu
from nemo_spin.model_io.fields.supported import LLAMA31_SCALING
from nemo_spin.model_io.fields.transformer import ACTIVATION_NAMES, fields_of, target
from nemo_spin.model_io.nemo2.fiddle_graph import fiddle_graph

_MODELS = "nemo.collections.llm.gpt.model."
_ACTIVATIONS = ACTIVATION_NAMES | {gelu_tanh: "nemo.collections.llm.fn.activation.openai_gelu"}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def write_context(
    directory: Path, architecture: Architecture, dtype: torch.dtype, tokenizer_node: Mapping[str, Any] | None
) -> None:
    """Write model.yaml and io.json into `directory`, the `context/` of a NeMo 2 checkpoint that is being written.

    dtype: of the stored weights. tokenizer_node: what `NeMoTokenizer.save_nemo2(directory)` returned; None for a model
    without a tokenizer.
    `architecture_from_nemo2`, given the tokenizer's number of ids, reads the same architecture back. Raises
    CheckpointError, naming it, for what NeMo 2's classes cannot express.
    """
    model = describe_model(architecture, dtype, tokenizer_node)
    context = {"_target_": "nemo.lightning.io.pl.TrainerContext", "model": model, "trainer": None, "extra": {}}
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "model.yaml").write_text(yaml.safe_dump(model), encoding="utf-8")
    (directory / "io.json").write_text(json.dumps(fiddle_graph(context)), encoding="utf-8")


def describe_model(
    architecture: Architecture, dtype: torch.dtype, tokenizer_node: Mapping[str, Any] | None
) -> dict[str, Any]:
    """model.yaml as plain data. What is not in it (fusions, parallel layout, optimizer) is left to NeMo's defaults."""
    if dtype not in _DTYPES:
        raise CheckpointError(f"NeMo 2 has no models in {dtype}: write the weights in bf16 or fp32.")
    module, model_class, config_class = _classes(architecture)
    config = {"_target_": f"{_MODELS}{module}.{config_class}", **_config(architecture)}
    config |= {
        "params_dtype": target(str(dtype)),
        "pipeline_dtype": target(str(dtype)),
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
    }
    if config_class == "Llama31Config":
        config |= {"scale_factor": architecture.rope_scaling_factor, **LLAMA31_SCALING}
    return {
        "_target_": f"{_MODELS}{module}.{model_class}",
        "config": config,
        "model_transform": None,
        "tokenizer": None if tokenizer_node is None else dict(tokenizer_node),
    }


def _classes(architecture: Architecture) -> tuple[str, str, str]:
    """Module, class of the model and class of its configuration.

    All fields are written, so that a class decides what the fields do not: the scaling of rotary embeddings, and
    which exporter to Hugging Face belongs to the model.
    """
    transformer = architecture.transformer
    if architecture.position_embedding_type == "rope" and architecture.rope_scaling:
        return "llama", "LlamaModel", "Llama31Config"
    plain = (
        architecture.position_embedding_type == "rope"
        and not architecture.seq_len_interpolation_factor
        and not transformer["rotary_interleaved"]
        and transformer["softmax_scale"] is None
        and not transformer["add_bias_linear"]
    )
    biased, normed = transformer["add_qkv_bias"], transformer["qk_layernorm"]
    kind = (
        transformer["normalization"],
        transformer["layernorm_zero_centered_gamma"],
        transformer["activation_func"],
        transformer["gated_linear_unit"],
    )
    if plain and kind == ("RMSNorm", False, F.silu, True) and architecture.rotary_percent == 1:
        if not normed:
            return ("qwen2", "Qwen2Model", "Qwen2Config") if biased else ("llama", "LlamaModel", "LlamaConfig")
        if not biased:
            return "qwen3", "Qwen3Model", "Qwen3Config"
    if plain and kind == ("LayerNorm", True, squared_relu, False) and not (biased or normed):
        return "nemotron", "NemotronModel", "NemotronConfig"
    return "base", "GPTModel", "GPTConfig"


def _config(architecture: Architecture) -> dict[str, Any]:
    config = fields_of(architecture)
    activation = config["activation_func"]
    if activation not in _ACTIVATIONS:
        raise CheckpointError(
            f"The activation {getattr(activation, '__name__', activation)} has no name in NeMo 2: known are "
            f"{', '.join(name.rsplit('.', 1)[-1] for name in _ACTIVATIONS.values())}."
        )
    # The class says whether rotary embeddings are scaled.
    del config["rope_scaling"], config["rope_scaling_factor"]
    config["activation_func"] = target(_ACTIVATIONS[activation])
    # Of the fused activations only that of SwiGLU computes the same as the plain one.
    config["bias_activation_fusion"] = activation is F.silu and config["gated_linear_unit"]
    # NeMo makes as many rows as vocab_size says, or pads the tokenizer's number of ids where it says nothing.
    if architecture.vocab_rows > architecture.vocab_size:
        config["vocab_size"] = None
        config["make_vocab_size_divisible_by"] = _padding_multiple(architecture.vocab_rows, architecture.vocab_size)
    if config["rotary_interleaved"]:
        config["apply_rope_fusion"] = False
    return config


def _padding_multiple(rows: int, vocab_size: int) -> int:
    """The smallest number to whose next multiple NeMo has to pad the vocabulary to get these rows.

    NeMo pads to a multiple of this times the tensor-parallel size: the smaller it is, the more layouts get these rows.
    """
    return next(multiple for multiple in range(rows - vocab_size + 1, rows + 1) if rows % multiple == 0)
