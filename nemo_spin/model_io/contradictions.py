"""Comparing what a checkpoint stores with what its configuration says, before anything is read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from nemo_spin.errors import CheckpointError
from nemo_spin.megatron.architecture import Architecture, layer_tensors, outer_tensors
from nemo_spin.model_io.fields.transformer import fields_of
from nemo_spin.model_io.stores.interface import LAYERS, StoredTensor, refused_dtype

# Parts of the name of a tensor, megatron-core's or Hugging Face's -> the fields that decide whether it exists and what
# its shape is. The first row counts.
_DECIDED_BY = {
    ("word_embeddings", "output_layer", "embed_tokens", "lm_head"): (
        "vocab_size hidden_size share_embeddings_and_output_weights"
    ),
    ("position_embeddings",): "position_embedding_type hidden_size",
    ("q_layernorm", "k_layernorm", "q_norm", "k_norm"): "num_layers kv_channels normalization qk_layernorm",
    ("norm",): "num_layers hidden_size normalization",
    (".bias",): "num_layers add_bias_linear add_qkv_bias",
    ("attn", "attention"): "num_layers hidden_size num_attention_heads num_query_groups kv_channels",
    ("mlp",): "num_layers hidden_size ffn_hidden_size gated_linear_unit",
}


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
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    quotes = {name: f"{name}: {value}" for name, value in fields_of(architecture).items() if name != "vocab_size"}
    check_shapes(shapes, each_expected(architecture), origin, "configuration", quotes)
    for name, tensor in tensors.items():
        if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
            raise refused_dtype(origin, name, tensor.dtype)


def check_shapes(
    stored: Mapping[str, tuple[int, ...]],
    expected: Iterable[tuple[str, tuple[int, ...]]],
    origin: str,
    config: str,
    quotes: Mapping[str, str],
) -> None:
    """Raises CheckpointError where stored tensors are missing, of another shape or too many.

    origin, config: what the checkpoint and its configuration are called in messages. quotes: field (of `fields_of`) ->
    what the configuration says of it ("num_layers: 2"), for those fields that it has.
    """
    names = set()
    for name, shape in expected:
        names.add(name)
        if name not in stored:
            raise CheckpointError(
                f"{origin} holds no tensor {name}, which its {config} asks for{_reason(name, quotes)}."
            )
        if stored[name] != shape:
            raise CheckpointError(
                f"{origin} contradicts itself: tensor {name} is {list(stored[name])}, but its {config} makes it "
                f"{list(shape)}{_reason(name, quotes)}."
            )
    for name in stored:
        if name not in names:
            raise CheckpointError(
                f"{origin} holds a tensor {name} that its {config} does not ask for{_reason(name, quotes)}: it is "
                "another kind of model than the configuration says."
            )


def _reason(name: str, quotes: Mapping[str, str]) -> str:
    """What the configuration says that decides on a tensor, in parentheses."""
    fields = next((fields for parts, fields in _DECIDED_BY.items() if any(part in name for part in parts)), "")
    quoted = [quotes[field] for field in fields.split() if field in quotes]
    return f" ({', '.join(quoted)})" if quoted else ""
