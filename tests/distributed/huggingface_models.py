"""Tiny models of each family that is read, made by transformers: every weight random, those of norms and biases too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROWS = 50
SIZES = {
    "vocab_size": ROWS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}


def llama3_rope(factor: float) -> dict[str, Any]:
    ends = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {"rope_type": "llama3", "factor": factor, **ends}


# Name -> class of transformers without "Config", and what it is given beside SIZES, in the spelling that all versions
# read; transformers 5 writes config.json in its own.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("Llama", {"num_key_value_heads": 4}),
    "llama2-linear": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama31": ("Llama", {"rope_scaling": llama3_rope(8.0), "head_dim": 8}),
    "llama32-tied": ("Llama", {"rope_scaling": llama3_rope(32.0), "tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-mqa": ("Llama", {"num_key_value_heads": 1}),
    "mistral": ("Mistral", {"num_attention_heads": 6, "head_dim": 12, "sliding_window": None, "rope_theta": 1e6}),
    "qwen2": ("Qwen2", {"rope_theta": 1e6}),
    "qwen3": ("Qwen3", {"head_dim": 16, "rope_theta": 1e6, "tie_word_embeddings": True}),
    "nemotron": ("Nemotron", {"norm_eps": 1e-5, "partial_rotary_factor": 0.5}),
    "nemotron-biases": ("Nemotron", {"attention_bias": True, "mlp_bias": True}),
}


@torch.no_grad()
def make(name: str, dtype: torch.dtype = torch.float32) -> Any:
    import transformers

    family, given = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES | given)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.to(dtype).eval()


def token_ids() -> Tensor:
    """[2, 300]: long enough for the scaling of positions to show."""
    return torch.randint(0, ROWS, (2, 300), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def write(directory: Path, name: str, max_shard_size: str = "1GB") -> Tensor:
    """Save the model as transformers does; returns its logits for `token_ids`, [2, 300, ROWS]."""
    model = make(name)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return model(token_ids()).logits
