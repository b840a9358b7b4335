"""Megatron-Bridge: the `run_config.yaml` of a checkpoint, to an Architecture and back.

The file is a dump of Python objects; it is read as data, and nothing that it names is ever imported. The names of its
classes carry meaning all the same: only providers of models that megatron-core's GPT computes are accepted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from nemo_spin.errors import CheckpointError
from nemo_spin.megatron.architecture import Architecture
from nemo_spin.model_io.fields.transformer import (
    ACTIVATION_NAMES,
    architecture_from_fields,
    fields_of,
    target,
    target_of,
)
from nemo_spin.model_io.stores.interface import StoredTensor

_BRIDGE = "megatron.bridge.models."
# Classes whose models differ from GPTModelProvider's in their fields only, whatever size their names end in.
_PROVIDERS = re.compile(
    r"(GPTModelProvider|GPTProvider\d+[MB]|LlamaModelProvider|Llama[23]ModelProvider|Llama3[123]ModelProvider"
    r"|CodeLlamaModelProvider|Llama31Nemotron(Nano8B|70B)Provider|Qwen2ModelProvider|Qwen25ModelProvider"
    r"|Qwen3ModelProvider|MistralModelProvider|MistralSmall3ModelProvider|NemotronModelProvider|Nemotron[34]ModelProvider"
    r")(\d+(P\d+)?[MB])?"
)
# The successor of the providers, which holds the TransformerConfig as a field.
_MODEL_CONFIGS = (
    "megatron.training.models.gpt.GPTModelConfig",
    "megatron.bridge.models.gpt.gpt_builder.GPTModelConfig",
)
# Fields of the providers that say where a model comes from and how it is built and run.
_INERT = frozenset(
    """
    _builder_ builder extra_checkpoint_metadata hf_model_id hf_model_revision mtp_enabled post_wrap_hooks pre_wrap_hooks
    should_pad_vocab use_arbitrary_attention_mask
    """.split()
)
# These belong to the position embeddings "yarn", which are refused.
_YARN = ("yarn_", "rotary_scaling_factor")


def architecture_from_run_config(
    config: Mapping[str, Any], tensors: Mapping[str, StoredTensor], vocab_size: int | None, where: str
) -> Architecture:
    """The architecture of a Megatron-Bridge model.

    config: run_config.yaml as plain data. See `architecture_from_fields` for the other arguments and errors.
    """
    model = config.get("model")
    if not isinstance(model, Mapping):
        raise CheckpointError(f"{where} has no model: it is not the configuration of a run of Megatron-Bridge.")
    provider = target_of(model)
    if provider in _MODEL_CONFIGS:
        transformer = model.get("transformer")
        model = (transformer if isinstance(transformer, Mapping) else {}) | {
            name: value for name, value in model.items() if name != "transformer"
        }
    elif not (provider.startswith(_BRIDGE) and _PROVIDERS.fullmatch(provider.rsplit(".", 1)[-1])):
        raise CheckpointError(
            f"{where} says model._target_: {provider}, which is not supported: supported are Megatron-Bridge's GPT, "
            "Llama, Mistral, Nemotron, Qwen2 and Qwen3 models without experts."
        )
    if model.get("restore_modelopt_state"):
        raise CheckpointError(
            f"{where} says model.restore_modelopt_state: true, and quantized weights are not supported."
        )
    fields = {name: value for name, value in model.items() if name not in _INERT and not str(name).startswith(_YARN)}
    return architecture_from_fields(fields, tensors, vocab_size, where, section="model.")


def refuse_adapters(config: Mapping[str, Any], where: str) -> None:
    """Raises CheckpointError for a checkpoint of adapters, which holds no whole model. Arguments as above."""
    if config.get("peft"):
        raise CheckpointError(
            f"{where} says peft: {target_of(config['peft'])}, a model with adapters: merge them into their base model "
            "first (Megatron-Bridge's examples/peft/merge_lora.py)."
        )


def to_run_config(
    architecture: Architecture, dtype: torch.dtype, tokenizer: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What Megatron-Bridge's loaders read: `architecture_from_run_config` reads the same architecture back.

    dtype: of the stored weights. tokenizer: `to_megatron`'s fields, None where there is none.
    """
    model = fields_of(architecture) | {
        "_target_": f"{_BRIDGE}gpt_provider.GPTModelProvider",
        "activation_func": target(ACTIVATION_NAMES[architecture.transformer["activation_func"]]),
        "bias_activation_fusion": False,
        "should_pad_vocab": True,
        "make_vocab_size_divisible_by": _divisor(architecture),
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "params_dtype": target(str(dtype)),
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
    }
    return {
        "_target_": "megatron.bridge.training.config.ConfigContainer",
        "model": model,
        "checkpoint": {
            "_target_": "megatron.bridge.training.config.CheckpointConfig",
            "ckpt_format": "torch_dist",
            "fully_parallel_save": False,
            "save_optim": False,
            "save_rng": False,
        },
        "tokenizer": None
        if tokenizer is None
        else {"_target_": "megatron.bridge.training.tokenizers.config.TokenizerConfig", **tokenizer},
    }


def _divisor(architecture: Architecture) -> int:
    """What Megatron-Bridge pads the vocabulary to a multiple of, so that the stored rows result; 1 where none does."""
    real, rows = architecture.vocab_size, architecture.vocab_rows
    return next((size for size in (128, 64, 32, 16, 8, 4, 2) if -(-real // size) * size == rows), 1)
