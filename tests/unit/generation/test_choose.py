"""Engines are refused before weights are loaded, where they cannot run or would compute something else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer import attention

from nemo_spin.errors import ConfigError
from nemo_spin.generation import megatron_engine_parts
from nemo_spin.generation.choose import check_engine


def model_with(softmax_scale: float | None) -> Any:
    return SimpleNamespace(transformer={"softmax_scale": softmax_scale})


@pytest.mark.parametrize(
    ("softmax_scale", "precision", "flash_attention", "says"),
    [
        (None, "32", True, "trainer.precision is 32"),
        (0.25, "bf16", True, "softmax_scale 0.25"),
        (None, "bf16", False, "needs flash-attn"),
        (None, "bf16", True, None),
    ],
)
def test_what_megatrons_engine_needs_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, softmax_scale: Any, precision: str, flash_attention: bool, says: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(attention, "HAVE_FA3", False)
    monkeypatch.setattr(megatron_engine_parts, "is_fa_min_version", lambda version: flash_attention)
    check_engine("auto", model_with(softmax_scale), precision)
    if says is None:
        check_engine("megatron", model_with(softmax_scale), precision)
        return
    with pytest.raises(ConfigError, match=says) as refused:
        check_engine("megatron", model_with(softmax_scale), precision)
    assert "set it to nemo_spin" in str(refused.value)


def test_a_missing_flash_attention_is_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="needs flash-attn"):
        check_engine("megatron", model_with(None), "bf16")


def test_on_a_cpu_there_is_nothing_to_refuse() -> None:
    check_engine("megatron", model_with(0.25), "32")
