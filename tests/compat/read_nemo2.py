"""Loads NeMo 2 directories with NeMo 2's own code; run by check_with_nemo.py in an environment that has it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import cpu_stubs
import nemo.collections.llm.gpt.model.base as nemo_gpt
import nemo.lightning.io.pl
import torch
from nemo.collections import llm
from nemo.lightning.io.connector import ModelConnector

STUBS = [*cpu_stubs.STUBS, "nemo.lightning.io.pl._fix_tensors_device, which moves what was loaded to the GPU"]


def install() -> None:
    cpu_stubs.install()
    nemo_gpt.local_layer_spec = cpu_stubs.layers
    nemo.lightning.io.pl._fix_tensors_device = lambda checkpoint: checkpoint


def load(case: dict[str, Any]) -> tuple[str, float]:
    """NeMo's own way from a directory to a model: load_context, MegatronStrategy.load_checkpoint."""
    path = Path(case["path"])
    model, _ = ModelConnector(path).nemo_load(path, cpu=True)
    found = model.tokenizer.text_to_ids(case["text"])
    if found != case["ids"]:
        raise AssertionError(f"{type(model.tokenizer).__name__} makes {found} of {case['text']!r}, not {case['ids']}")
    where = f"{type(model).__name__}({type(model.config).__name__}), {type(model.tokenizer).__name__}"
    return f"nemo_load: {where}; logits", cpu_stubs.difference(model.module, torch.load(case["truth"]))


def export(case: dict[str, Any]) -> tuple[str, float]:
    """The whole command that takes a NeMo 2 directory to Hugging Face, and what transformers makes of the result."""
    from transformers import AutoModelForCausalLM

    truth = torch.load(case["truth"])
    with tempfile.TemporaryDirectory() as folder:
        llm.export_ckpt(Path(case["path"]), "hf", Path(folder) / "hf", overwrite=True)
        model = AutoModelForCausalLM.from_pretrained(Path(folder) / "hf", dtype=torch.float32)
        with torch.no_grad():
            logits = model(truth["input_ids"]).logits
    real = min(logits.shape[-1], truth["logits"].shape[-1])
    found = float((logits[..., :real] - truth["logits"][..., :real]).abs().max())
    return f"export_ckpt to Hugging Face, {type(model).__name__}; logits", found


def read(case: dict[str, Any]) -> tuple[str, float]:
    install()
    return export(case) if case["how"] == "export" else load(case)


if __name__ == "__main__":
    cpu_stubs.run_cases(read, STUBS)
