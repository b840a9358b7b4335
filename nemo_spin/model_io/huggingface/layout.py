"""Hugging Face: one description of the layout of weights, for both directions.

It says of which rows of which Hugging Face tensors a tensor of megatron-core consists.
"""

from __future__ import annotations

from dataclasses import dataclass

from nemo_spin.megatron.architecture import Architecture, layer_tensors
from nemo_spin.model_io.stores.interface import EMBEDDING, LAYERS, OUTPUT_LAYER

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

OUTER = {
    EMBEDDING: "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "decoder.final_layernorm.bias": "model.norm.bias",
    OUTPUT_LAYER: "lm_head.weight",
}
# Within a layer: everything that is the same tensor under another name.
_RENAMED = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_bias": "input_layernorm.bias",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "self_attention.linear_proj.bias": "self_attn.o_proj.bias",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "mlp.linear_fc1.layer_norm_bias": "post_attention_layernorm.bias",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    "mlp.linear_fc2.bias": "mlp.down_proj.bias",
}


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows start to stop, exclusive, of a Hugging Face tensor."""

    name: str
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


def segments(name: str, architecture: Architecture) -> list[Segment]:
    """The rows that a tensor of megatron-core consists of, in its order; every other axis is the same in both.

    name: one of `contradictions.expected_tensors`. Rows of padding, beyond the vocabulary, are in no segment.
    """
    transformer = architecture.transformer
    if name in (EMBEDDING, OUTPUT_LAYER):
        return [Segment(OUTER[name], 0, architecture.vocab_size)]
    if name in OUTER:
        return [Segment(OUTER[name], 0, transformer["hidden_size"])]
    index, _, inner = name.removeprefix(LAYERS).partition(".")
    layer = f"model.layers.{index}."
    kind = inner.rpartition(".")[2]
    if inner in _RENAMED:
        rows = layer_tensors(transformer)[inner][0]
        return [Segment(layer + _RENAMED[inner], 0, rows)]
    if inner.startswith("mlp.linear_fc1."):
        parts = ("gate_proj", "up_proj") if transformer["gated_linear_unit"] else ("up_proj",)
        return [Segment(f"{layer}mlp.{part}.{kind}", 0, transformer["ffn_hidden_size"]) for part in parts]
    # linear_qkv: for each query group its queries, then one key and one value.
    groups, head_dim = transformer["num_query_groups"], transformer["kv_channels"]
    per_group = {"q": transformer["num_attention_heads"] // groups * head_dim, "k": head_dim, "v": head_dim}
    return [
        Segment(f"{layer}self_attn.{which}_proj.{kind}", group * rows, (group + 1) * rows)
        for group in range(groups)
        for which, rows in per_group.items()
    ]


def huggingface_shapes(name: str, shape: tuple[int, ...], architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Name and shape of the Hugging Face tensors that a tensor of megatron-core consists of."""
    return {segment.name: (segment.stop, *shape[1:]) for segment in segments(name, architecture)}
