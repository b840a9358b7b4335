"""`nemo-spin inspect`: what a checkpoint is, from its descriptions alone; no weights are read.

What keeps it from being used is a finding here, not an error: the rest is still shown.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from nemo_spin.errors import CheckpointError, ConfigError, printable
from nemo_spin.megatron.architecture import Architecture, check_layout
from nemo_spin.model_io.open import open_checkpoint
from nemo_spin.model_io.source import CheckpointSource
from nemo_spin.model_io.tokenizers import NeMoTokenizer, build_tokenizer, check_tokenizer_fits
from nemo_spin.model_io.tokenizers.build import local_path

FAMILIES = {
    "nemo1": "NeMo 1 .nemo",
    "nemo2": "NeMo 2 directory",
    "megatron": "Megatron-LM directory",
    "bridge": "Megatron-Bridge directory",
    "huggingface": "Hugging Face directory",
}


def inspect_checkpoint(path: str | Path) -> dict[str, Any]:
    """What is known of the checkpoint, as plain data for JSON; `problems` has what keeps it from being used.

    Raises CheckpointError if there is none at `path`.
    """
    with open_checkpoint(path) as source:
        tensors = source.tensors.values()
        found: dict[str, Any] = {
            "path": str(source.path),
            "chosen": source.chosen,
            "family": FAMILIES[source.family],
            "layout": source.layout,
            "written_by": source.written_by,
            "parameters": sum(tensor.numel for tensor in tensors),
            "precision": dict(Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors).most_common()),
            "bytes": sum(tensor.numel * tensor.dtype.itemsize for tensor in tensors),
            "architecture": None,
            "layouts": None,
            "tokenizer": None,
            "problems": [],
        }
        tokenizer = _tokenizer(source, found)
        try:
            architecture = source.architecture(tokenizer and tokenizer.vocab_size)
            if tokenizer is not None:
                check_tokenizer_fits(tokenizer, architecture.vocab_rows, str(source.path))
        except CheckpointError as error:
            found["problems"].append(str(error))
        else:
            found["architecture"] = _describe(architecture)
            found["layouts"] = _layouts(architecture)
    return found


def _describe(architecture: Architecture) -> dict[str, Any]:
    transformer = dict(architecture.transformer)
    transformer["activation_func"] = transformer["activation_func"].__name__
    outside = {name: value for name, value in vars(architecture).items() if name != "transformer"}
    return transformer | outside


def _layouts(architecture: Architecture) -> dict[str, list[int]]:
    """Every tensor- and every pipeline-parallel size that divides the model; any of one goes with any of the other."""

    def fits(tp: int, pp: int) -> bool:
        try:
            check_layout(architecture, tp, pp)
        except ConfigError:
            return False
        return True

    heads, layers = architecture.transformer["num_attention_heads"], architecture.transformer["num_layers"]
    return {
        "tensor_model_parallel_size": [tp for tp in range(1, heads + 1) if fits(tp, 1)],
        "pipeline_model_parallel_size": [pp for pp in range(1, layers + 1) if fits(1, pp)],
    }


def _tokenizer(source: CheckpointSource, found: dict[str, Any]) -> NeMoTokenizer | None:
    """The tokenizer, if it is at hand; what is known of it goes into `found`."""
    described = source.tokenizer
    if described is None:
        found["problems"].append("The checkpoint names no tokenizer: give one as model.tokenizer.")
        return None
    at_hand = local_path(described, source.places) is not None
    known = found["tokenizer"] = {"library": described.library, "source": described.source, "found": at_hand}
    if not at_hand:
        found["problems"].append(
            f"The tokenizer {described.source} is not among the checkpoint's files: have it at hand by this name, or "
            "give another as model.tokenizer."
        )
        return None
    try:
        tokenizer = build_tokenizer(described, source.places)
    except CheckpointError as error:
        found["problems"].append(str(error))
        return None
    known |= {"vocab_size": tokenizer.vocab_size, "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
    return tokenizer


def as_text(found: dict[str, Any]) -> str:
    """For people: a line per fact."""
    lines = [f"{found['path']}: {found['family']}, {found['layout']}"]
    if found["chosen"]:
        lines.append(found["chosen"])
    facts = {
        "written by": found["written_by"] or "not said",
        "parameters": f"{found['parameters']:,} ({_count(found['parameters'])}), {_size(found['bytes'])}",
        "precision": ", ".join(f"{dtype} ({number} tensors)" for dtype, number in found["precision"].items()),
    }
    if architecture := found["architecture"]:
        facts |= _architecture_lines(architecture)
        facts["layouts"] = "; ".join(
            f"{short} {', '.join(map(str, found['layouts'][name]))}"
            for short, name in (("TP", "tensor_model_parallel_size"), ("PP", "pipeline_model_parallel_size"))
        )
    if tokenizer := found["tokenizer"]:
        place = "in the checkpoint" if tokenizer["found"] else "not in the checkpoint"
        facts["tokenizer"] = f"{tokenizer['library']}, {tokenizer['source']} ({place})"
        if "vocab_size" in tokenizer:
            facts["tokenizer"] += f", {tokenizer['vocab_size']} ids, end of sequence {tokenizer['eos_id']}"
    width = max(map(len, facts))
    lines += [f"  {name:<{width}}  {value}" for name, value in facts.items()]
    lines += [f"problem: {problem}" for problem in found["problems"]] or ["Nothing is missing."]
    return "\n".join(map(printable, lines))


def _architecture_lines(architecture: dict[str, Any]) -> dict[str, str]:
    a = architecture
    positions = {"rope": "RoPE", "learned_absolute": "learned positions", "none": "no positions"}
    position = positions[a["position_embedding_type"]]
    if a["position_embedding_type"] == "rope":
        position += f", base {a['rotary_base']:g}"
        position += f", {a['rotary_percent']:.0%} of each head" if a["rotary_percent"] != 1 else ""
        position += f", Llama 3.1 scaling x {a['rope_scaling_factor']:g}" if a["rope_scaling"] else ""
        if a["seq_len_interpolation_factor"]:
            position += f", positions divided by {a['seq_len_interpolation_factor']:g}"
    gated = "gated " if a["gated_linear_unit"] else ""
    biases = [name for name, on in (("all", a["add_bias_linear"]), ("qkv", a["add_qkv_bias"])) if on]
    rows = f"{a['vocab_rows']:,} rows"
    if a["vocab_size"] != a["vocab_rows"]:
        rows = f"{a['vocab_size']:,} tokens in {rows}"
    return {
        "layers": f"{a['num_layers']} x hidden {a['hidden_size']}, ffn {a['ffn_hidden_size']} ({gated}"
        f"{a['activation_func']}), {a['normalization']} (epsilon {a['layernorm_epsilon']:g})",
        "attention": f"{a['num_attention_heads']} heads of {a['kv_channels']}, {a['num_query_groups']} query groups"
        f"{', q and k normalized' if a['qk_layernorm'] else ''}; biases: {', '.join(biases) or 'none'}",
        "positions": f"{position}; context {a['max_sequence_length']}",
        "vocabulary": f"{rows}, output layer {'tied' if a['share_embeddings_and_output_weights'] else 'of its own'}",
    }


def _size(number: int) -> str:
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.2f} MiB"


def _count(number: int) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return str(number)
