"""Hugging Face directories compute in every layout what transformers computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from harness import Workers
from huggingface_models import MODELS, ROWS, token_ids, write
from test_checkpoints import CHECKPOINTS, genuine, logits
from torch import Tensor

from nemo_spin.megatron.gpt import build_gpt
from nemo_spin.model_io.huggingface.config import architecture_from_huggingface, read_huggingface_config
from nemo_spin.model_io.huggingface.export import write_huggingface_config, write_huggingface_weights
from nemo_spin.model_io.huggingface.weights import HuggingFaceStore
from nemo_spin.model_io.open import open_checkpoint
from nemo_spin.model_io.tokenizers import build_tokenizer
from nemo_spin.model_io.weights import load_weights


def difference(directory: Path, expected: Tensor) -> float:
    architecture = architecture_from_huggingface(read_huggingface_config(directory, "it"), "it")
    model = build_gpt(architecture, "32")
    load_weights(model, HuggingFaceStore(directory, architecture, "it"), "it")
    found = logits(model, token_ids())
    return 0.0 if found is None else float((found[..., :ROWS] - expected).abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(workers: Workers, tmp_path: Path, name: str) -> None:
    expected = write(tmp_path, name, max_shard_size="20KB")
    assert float(expected.std()) > 0.5
    for tp, pp in ((1, 1), (2, 1), (1, 2)):
        if (name, tp) != ("llama-mqa", 2):  # one query group, which cannot be shared out
            assert max(workers.run(difference, tmp_path, expected, tp=tp, pp=pp)) < 1e-4


@genuine
@pytest.mark.parametrize("name", ["nemo2_llama", "nemo1_llama_sp.nemo", "nemo1_llama_sp_zarr.nemo"])
def test_genuine_checkpoints_give_their_ground_truth_in_transformers(tmp_path: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with open_checkpoint(CHECKPOINTS / name) as source:
        tokenizer = build_tokenizer(source.tokenizer, source.places)
        architecture = source.architecture(tokenizer.vocab_size)
        dtype = source.tensors["decoder.final_layernorm.weight"].dtype
        write_huggingface_config(architecture, dtype, tmp_path, eos_token_id=tokenizer.eos_id)
        write_huggingface_weights(source.weights(), architecture, tmp_path)
        assert tokenizer.save_huggingface(tmp_path) is None
    truth = torch.load(CHECKPOINTS / f"gt_{name.removesuffix('.nemo')}.pt", weights_only=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).float().eval()
    with torch.no_grad():
        found = model(truth["input_ids"]).logits
    assert float((found - truth["logits"][..., : found.shape[-1]]).abs().max()) < 1e-4
    text = "How many are 12 and 30?\nThey are 42."
    theirs = AutoTokenizer.from_pretrained(tmp_path).encode(text, add_special_tokens=False)
    assert theirs == tokenizer.encode(text)
