"""Hugging Face directories compute in every layout what transformers computes."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import Workers
from huggingface_models import MODELS, ROWS, token_ids, write
from test_checkpoints import logits
from torch import Tensor

from nemo_spin.checkpoint.huggingface import architecture_from_huggingface, read_huggingface_config
from nemo_spin.checkpoint.huggingface_weights import HuggingFaceStore
from nemo_spin.checkpoint.weights import load_weights
from nemo_spin.megatron.gpt import build_gpt


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
