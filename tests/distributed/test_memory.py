"""The arithmetic of memory against the tensors of real models, rank by rank."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from selfplay import SelfPlay
from toy import toy_architecture

from nemo_spin.commands.memory_estimate import check_fits, estimate
from nemo_spin.config import SpinConfig, config_dir, parse_config
from nemo_spin.errors import ConfigError


def config(tp: int = 1, pp: int = 1, dp: int = 1, **changes: Any) -> SpinConfig:
    cfg = OmegaConf.load(config_dir() / "gpt_spin.yaml")
    values = {
        "pretrained_checkpoint.restore_from_path": "x",
        "model.data.train_ds.file_path": "x",
        "trainer.accelerator": "cpu",
        "trainer.precision": 32,
        "trainer.devices": tp * pp * dp,
        "model.tensor_model_parallel_size": tp,
        "model.pipeline_model_parallel_size": pp,
    }
    for key, value in (values | changes).items():
        OmegaConf.update(cfg, key, value)
    return parse_config(OmegaConf.to_container(cfg, resolve=True))


def bytes_held(**model: Any) -> tuple[int, int, int]:
    """(weights, gradients, optimizer states) of this rank, after a step."""
    play = SelfPlay(**model)
    play.optimizer.start(1e-3, 2)
    play.optimizer.zero_grad()
    play.optimizer.step()
    parameters = list(play.gpt.parameters())
    states = {
        tensor.data_ptr(): tensor.nbytes
        for values in play.optimizer._moments()
        for tensor in values.values()
        if isinstance(tensor, torch.Tensor) and tensor.dim()
    }
    gradients = sum(buffer.grad_data.nbytes for buffer in play.optimizer.model.buffers)
    return sum(p.nbytes for p in parameters), gradients, sum(states.values())


@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"pp": 2}, {"tp": 2, "pp": 2}], ids=str)
@pytest.mark.parametrize(("tied", "name"), [(False, "adam"), (True, "adam"), (False, "rmsprop")])
def test_the_fullest_rank_is_as_full_as_estimated(workers: Any, layout: dict[str, int], tied: bool, name: str) -> None:
    arch = dataclasses.replace(toy_architecture(), share_embeddings_and_output_weights=tied)
    cfg = config(**layout, **{"model.optim.name": name, "model.optim.weight_decay": 0})
    needs = estimate(arch, cfg, longest=20, context_length=40, examples=100)
    held = workers.run(bytes_held, architecture={"share_embeddings_and_output_weights": tied}, name=name, **layout)
    weights, gradients, optimizer = (max(rank[i] for rank in held) for i in range(3))
    assert needs.weights == weights
    # buffers are padded to what collectives like
    assert needs.gradients <= gradients < needs.gradients + 4096
    assert needs.optimizer == optimizer


def test_the_optimizer_is_shared_by_replicas_and_keeps_main_parameters_in_bf16() -> None:
    arch = toy_architecture()
    sizes = {"longest": 20, "context_length": 40, "examples": 100}
    one, two = (estimate(arch, config(dp=dp), **sizes) for dp in (1, 2))
    assert (one.optimizer, two.optimizer) == (8 * one.parameters_per_device, 4 * one.parameters_per_device)
    bf16 = estimate(arch, config(**{"trainer.precision": "bf16"}), **sizes)
    assert (2 * bf16.weights, bf16.gradients, 2 * bf16.optimizer) == (one.weights, one.gradients, 3 * one.optimizer)
    whole = estimate(arch, config(dp=2, **{"model.optim.name": "adam"}), **sizes)
    assert whole.optimizer == one.optimizer
    rmsprop = {"model.optim.name": "rmsprop", "model.optim.weight_decay": 0}
    halves = (estimate(arch, config(dp=2, **rmsprop, **{"trainer.precision": p}), **sizes) for p in (32, "bf16"))
    assert [needs.optimizer // needs.parameters_per_device for needs in halves] == [4, 8]


def test_what_cannot_fit_is_refused_with_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    huge = toy_architecture()
    huge = dataclasses.replace(huge, transformer=huge.transformer | {"num_layers": 10**9})
    cfg = config()
    with pytest.raises(ConfigError, match=r"needs at least .* GiB .*weights .*tensor_model_parallel_size"):
        check_fits(estimate(huge, cfg, 20, 40, 100), cfg)
    check_fits(estimate(toy_architecture(), cfg, 20, 40, 100), cfg)
    slots = config(**{"model.spin.rollout_batch_size": 10**12})
    with pytest.raises(ConfigError, match=r"lower model\.spin\.rollout_batch_size"):
        check_fits(estimate(toy_architecture(), slots, 20, 40, 10**12), slots)
