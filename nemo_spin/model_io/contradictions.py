"""Comparing what a checkpoint stores with what its configuration says, before anything is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nemo_spin.errors import CheckpointError
from nemo_spin.megatron.architecture import Architecture, layer_tensors, outer_tensors
from nemo_spin.model_io.stores.interface import EMBEDDING, LAYERS, OUTPUT_LAYER, POSITIONS, StoredTensor

_QK_NORMS = tuple(f"{which}_layernorm.{kind}" for which in "qk" for kind in ("weight", "bias"))


def expected_tensors(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight of the architecture, with layers one by one."""
    return dict(each_expected(architecture))


def each_expected(architecture: Architecture) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The same, one at a time: a configuration may claim any number of layers, and the first that is missing tells."""
    yield from outer_tensors(architecture).items()
    of_layer = layer_tensors(architecture.transformer)
    for index in range(architecture.transformer["num_layers"]):
        for name, shape in of_layer.items():
            yield f"{LAYERS}{index}.{name}", shape


def check_against(tensors: Mapping[str, StoredTensor], architecture: Architecture, origin: str) -> None:
    """Raises CheckpointError, naming tensor and configuration, where the stored tensors contradict the architecture."""
    expected = set()
    for name, shape in each_expected(architecture):
        expected.add(name)
        if name not in tensors:
            raise CheckpointError(
                f"{origin} holds no tensor {name}, which its configuration asks for{reason(name, architecture)}."
            )
        if tensors[name].shape != shape:
            raise CheckpointError(
                f"{origin} contradicts itself: tensor {name} is {list(tensors[name].shape)}, but its configuration "
                f"makes it {list(shape)}{reason(name, architecture)}."
            )
        if not tensors[name].dtype.is_floating_point or tensors[name].dtype.itemsize < 2:
            raise CheckpointError(
                f"{origin} stores {name} as {tensors[name].dtype}, which is not supported: re-save it in bf16 or fp32."
            )
    for name in tensors:
        if name not in expected:
            raise CheckpointError(
                f"{origin} holds a tensor {name} that its configuration does not ask for{reason(name, architecture)}: "
                "it is another kind of model than the configuration says."
            )


def reason(name: str, architecture: Architecture) -> str:
    """The keys of the configuration that decide whether a tensor exists and what its shape is, in parentheses."""
    transformer = architecture.transformer
    if name in (EMBEDDING, OUTPUT_LAYER):
        fields: dict[str, Any] = {
            "share_embeddings_and_output_weights": architecture.share_embeddings_and_output_weights,
            "hidden_size": transformer["hidden_size"],
        }
    elif name == POSITIONS:
        fields = {
            "position_embedding_type": architecture.position_embedding_type,
            "hidden_size": transformer["hidden_size"],
        }
    elif "norm" in name:
        names = ["num_layers", "hidden_size", "normalization"] + (["qk_layernorm"] if name.endswith(_QK_NORMS) else [])
        fields = {name: transformer[name] for name in names}
    elif name.endswith(".bias"):
        fields = {name: transformer[name] for name in ("num_layers", "add_bias_linear", "add_qkv_bias")}
    elif "linear_qkv" in name or "linear_proj" in name:
        names = ["num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"]
        fields = {name: transformer[name] for name in names}
    elif "linear_fc" in name:
        names = ["num_layers", "hidden_size", "ffn_hidden_size", "gated_linear_unit"]
        fields = {name: transformer[name] for name in names}
    else:
        return ""
    return " (" + ", ".join(f"{name}: {value}" for name, value in fields.items()) + ")"
