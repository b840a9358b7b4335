"""NeMo 2: `context/model.yaml`, to an Architecture.

The file is a dump of Python objects; it is read as data, and nothing that it names is ever imported. `_target_` names
carry meaning all the same: only the configuration classes of models that megatron-core's GPT computes are accepted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_spin.errors import CheckpointError
from nemo_spin.megatron.architecture import Architecture
from nemo_spin.model_io.fields.transformer import architecture_from_fields, target_of
from nemo_spin.model_io.stores.interface import StoredTensor

NEMO2_PREFIX = "module."

# Modules of nemo.collections.llm.gpt.model whose classes differ from GPTConfig in their fields only, or in the
# Llama 3.1 scaling of rotary embeddings. Others add computation of their own (Gemma scales its embeddings, ...).
_MODULES = frozenset(
    """
    baichuan base chatglm llama llama_nemotron mistral nemotron phi3mini qwen2 qwen3 starcoder starcoder2
    """.split()
)
_NEMO = "nemo.collections.llm.gpt.model."


def architecture_from_nemo2(
    context: Mapping[str, Any], tensors: Mapping[str, StoredTensor], vocab_size: int | None, where: str
) -> Architecture:
    """The architecture of a NeMo 2 model.

    context: model.yaml as plain data. See `architecture_from_fields` for the other arguments and errors.
    """
    config = context.get("config")
    if not isinstance(config, Mapping):
        raise CheckpointError(f"{where} has no config: it is not the description of a model.")
    for node, what in ((context, "model"), (config, "configuration")):
        target = target_of(node)
        module = target.removeprefix(_NEMO).split(".")[0] if target.startswith(_NEMO) else None
        if module not in _MODULES:
            raise CheckpointError(
                f"{where} is of the {what} class {target}, which is not supported: supported are NeMo's GPT classes of "
                f"{', '.join(sorted(_MODULES))}."
            )
    if context.get("model_transform"):
        raise CheckpointError(
            f"{where} says model_transform: {target_of(context['model_transform'])}, a model with adapters: merge them "
            "into their base model first (NeMo 2's llm.peft.merge_lora)."
        )
    return architecture_from_fields(config, tensors, vocab_size, where, section="config.")
