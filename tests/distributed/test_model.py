"""The model as NeMo restores and saves it."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from runs import make_checkpoint, shards_of
from selfplay import examples, whole_weights

from nemo_spin.config import config_dir, parse_config
from nemo_spin.errors import UserError


@pytest.fixture(scope="module")
def archive(workers: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    return workers.run(make_checkpoint, str(tmp_path_factory.mktemp("archive")), tp=2)[0]


def restore(path: str, how: str = "ours") -> dict[str, Any]:
    from nemo.core.classes import ModelPT
    from nemo.core.connectors.save_restore_connector import SaveRestoreConnector

    from nemo_spin import MegatronGPTSPINModel

    if how == "ours":
        model = MegatronGPTSPINModel.restore_from(path)
    elif how == "ModelPT with NeMo's connector":
        model = ModelPT.restore_from(path)
    else:
        model = SaveRestoreConnector().restore_from(MegatronGPTSPINModel, path)
    assert isinstance(model, MegatronGPTSPINModel)
    return {"shards": shards_of(model), "decoded": model.tokenizer.decode(model.tokenizer.encode("4 plus 5"))}


@pytest.fixture(scope="module")
def restored(workers: Any, archive: str) -> dict[str, torch.Tensor]:
    return whole_weights([r["shards"] for r in workers.run(restore, archive)])


HOWS = ["ours", "ModelPT with NeMo's connector", "SaveRestoreConnector"]


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("layout", [{"tp": 1}, {"tp": 2, "pp": 2}], ids=["tp1", "tp2-pp2"])
def test_our_archive_is_read_by_us_and_by_nemo(
    workers: Any, archive: str, restored: dict[str, torch.Tensor], how: str, layout: dict[str, int]
) -> None:
    results = workers.run(restore, archive, how, **layout)
    weights = whole_weights([result["shards"] for result in results])
    for key, tensor in restored.items():
        assert torch.equal(weights[key][: len(tensor)], tensor[: len(weights[key])]), key
    assert results[0]["decoded"] == "4 plus 5"


def save_again(path: str, target: str) -> str:
    from nemo_spin import MegatronGPTSPINModel

    MegatronGPTSPINModel.restore_from(path).save_to(target)
    return target


def test_saving_at_another_layout_keeps_every_bit(
    workers: Any, archive: str, restored: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    target = workers.run(save_again, archive, str(tmp_path / "again.nemo"), tp=2, pp=2)[0]
    assert [path.name for path in tmp_path.iterdir()] == ["again.nemo"]
    unpacked = tmp_path / "unpacked"
    with tarfile.open(target) as tar:
        tar.extractall(unpacked, filter="data")
    for path in (target, str(unpacked)):
        weights = whole_weights([workers.run(restore, path)[0]["shards"]])
        for key, tensor in restored.items():
            assert torch.equal(weights[key], tensor), key


def config_of(path: str) -> dict[str, Any]:
    from omegaconf import OmegaConf

    from nemo_spin import MegatronGPTSPINModel

    return OmegaConf.to_container(MegatronGPTSPINModel.restore_from(path, return_config=True))


def test_the_configuration_is_in_nemo_1_names(workers: Any, archive: str) -> None:
    (config,) = workers.run(config_of, archive)
    expected = {"num_layers": 4, "normalization": "rmsnorm", "encoder_seq_length": 64, "mcore_gpt": True}
    assert expected.items() <= config.items()
    with tarfile.open(archive) as tar:
        text = tar.extractfile("./model_config.yaml").read().decode()
    assert "target: nemo_spin.model.MegatronGPTSPINModel" in text


def refusal(path: str, **cfg: Any) -> str:
    from omegaconf import OmegaConf

    from nemo_spin import MegatronGPTSPINModel

    try:
        MegatronGPTSPINModel.restore_from(path, override_config_path=OmegaConf.create(cfg))
    except UserError as error:
        return str(error)
    return ""


def test_what_cannot_be_restored_is_refused_in_a_sentence(workers: Any, archive: str, tmp_path: Path) -> None:
    assert "no checkpoint" in workers.run(refusal, str(tmp_path / "missing.nemo"))[0]
    assert "query groups" in workers.run(refusal, archive, tp=4)[0]
    other = {"library": "sentencepiece", "model": str(tmp_path / "none.model")}
    assert "which is not there" in workers.run(refusal, archive, tokenizer=other)[0]


def stop_check() -> list[bool]:
    from nemo_spin.generation.end_strings import ends_with_any

    class Letters:
        def decode(self, ids: list[int]) -> str:
            return "".join(map(chr, ids))

    should_stop = ends_with_any(["END", "\n\n"], Letters())
    return [should_stop([ord(c) for c in text]) for text in ("abc", "abcEN", "abcEND", "a\n\n", "a\n")]


def test_end_strings_are_found_across_tokens(workers: Any) -> None:
    assert workers.run(stop_check)[0] == [False, False, True, True, False]


def roll_out_at(path: str, temperatures: Any) -> tuple[list[float], list[list[tuple[int, ...]]]]:
    """What the settings of both iterations say, and the responses of both."""
    from nemo_spin import MegatronGPTSPINModel

    base = OmegaConf.load(config_dir() / "gpt_spin.yaml")
    values = {
        "pretrained_checkpoint.restore_from_path": path,
        "model.data.train_ds.file_path": path,
        "trainer.accelerator": "cpu",
        "trainer.precision": 32,
        "trainer.spin.max_iterations": 2,
        "model.spin.length_params.max_length": 8,
        "model.spin.sampling_params.temperature": temperatures,
    }
    for key, value in values.items():
        OmegaConf.update(base, key, value)
    model = MegatronGPTSPINModel.restore_from(path, override_config_path=base.model)
    cfg = parse_config(OmegaConf.to_container(base, resolve=True))
    policy = model.policy(cfg, context_length=64, stop_ids=frozenset())
    # Before anything is generated, as a run asks; and in any order.
    settings = [policy.rollout_settings(iteration)["temperature"] for iteration in (0, 1)]
    data = examples(vocab_size=28)
    responses = {i: [tuple(r.rejected_ids) for r in policy.roll_out(data, i)] for i in (1, 0)}
    assert [policy.rollout_settings(iteration)["temperature"] for iteration in (0, 1)] == settings
    return settings, [responses[0], responses[1]]


def test_each_iteration_has_its_temperature(workers: Any, archive: str) -> None:
    (both,), (cool,), (hot,) = (workers.run(roll_out_at, archive, values) for values in ([0.5, 2.0], 0.5, 2.0))
    assert both == ([0.5, 2.0], [cool[1][0], hot[1][1]])
    assert cool[1][0] != hot[1][0]
    assert cool[1][1] != hot[1][1]
