"""`nemo-spin doctor`: the environment as it is, was, or might be; a configuration judged without its files."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from nemo_spin.cli.main import main
from nemo_spin.commands import environment
from nemo_spin.commands.environment import components, state_of

pytestmark = pytest.mark.filterwarnings("ignore:In 'gpt_spin':UserWarning")  # hydra, of a file without _self_
ALIGNERS = Path(__file__).resolve().parents[2] / "nemo_aligner" / "gpt_spin.yaml"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Put a version here, or None, to have that distribution at it, or absent."""
    pretended: dict[str, str | None] = {}
    genuine = metadata.version

    def version(name: str) -> str:
        if name in pretended and pretended[name] is None:
            raise metadata.PackageNotFoundError(name)
        return pretended.get(name) or genuine(name)

    monkeypatch.setattr(metadata, "version", version)
    return pretended


def doctor(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = main(["doctor", "--json", *arguments])
    return code, json.loads(capsys.readouterr().out)


def test_the_environment_of_the_tests_is_fine(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = doctor(capsys)
    assert (code, found["ok"], found["config"]) == (0, True, None)
    by_name = {one["name"]: one for one in found["environment"]}
    for name, distribution in {"torch": "torch", "NeMo": "nemo_toolkit", "megatron-core": "megatron-core"}.items():
        assert by_name[name]["version"] == metadata.version(distribution) and by_name[name]["state"] == "ok"
    assert {"Python", "CUDA", "NCCL", "TransformerEngine", "Apex", "transformers", "wandb", "mlflow"} <= set(by_name)
    assert all(one["says"] for one in found["environment"] if one["state"] == "absent")


def test_a_package_that_is_missing_or_too_old_ends_in_2(
    installed: dict[str, str | None], capsys: pytest.CaptureFixture[str]
) -> None:
    installed |= {"nemo-toolkit": "2.5.0", "transformers": None, "wandb": None, "megatron-core": "99.0", "psutil": "1"}
    code, found = doctor(capsys)
    assert code == 2 and not found["ok"]
    states = {one["name"]: (one["state"], one["is_wrong"]) for one in found["environment"]}
    assert states["NeMo"] == states["psutil"] == ("too old", True)
    assert states["transformers"] == ("absent", True)
    assert states["megatron-core"] == ("too new", False)
    assert states["wandb"] == ("absent", False)
    assert main(["doctor"]) == 2
    out = capsys.readouterr().out
    assert "A run cannot begin here before this is put right: NeMo, transformers, psutil." in out
    assert "pip install 'transformers>=" in out


@pytest.mark.parametrize(
    ("version", "supported", "state"),
    [
        ("2.6.0", ">=2.6,<3", "ok"),
        ("2.6.0a0+ecf3bae40a.nv25.01", ">=2.6,<3", "ok"),  # a build of NVIDIA's container
        ("2.5.1+cu124", ">=2.6,<3", "too old"),
        ("3.0", ">=2.6,<3", "too new"),
        ("0.16.0rc0", ">=0.16.1,<0.17", "too old"),
        ("built here", ">=1", "ok"),
    ],
)
def test_versions(version: str, supported: str, state: str) -> None:
    assert state_of(version, supported) == state


def test_apex_is_nvidias_only_with_its_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def apex() -> environment.Component:
        return next(one for one in components() if one.name == "Apex")

    assert apex().state == "absent" and "slower steps" in apex().says
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise ImportError('must not be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert apex().state == "absent" and "is not NVIDIA's" in apex().says
    (tmp_path / "amp_C.py").write_text("")
    assert apex().state == "ok"


def test_transformer_engine_needs_its_part_for_pytorch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def engine() -> environment.Component:
        return next(one for one in components() if one.name == "TransformerEngine")

    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text("raise ImportError('must not be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert engine().state == "absent" and "its part for PyTorch is missing" in engine().says
    (tmp_path / "transformer_engine" / "transformer_engine_torch.cpython-311.so").write_text("")
    assert engine().state == "ok"


def test_a_configuration_of_nemo_aligner(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = doctor(capsys, "--config", str(ALIGNERS), "model.spin.rollout_micro_batch_size=4")
    config = found["config"]
    assert code == 0 and found["ok"] and config["refused"] == []
    assert set(config["missing"]) == {
        "pretrained_checkpoint.restore_from_path",
        "model.data.train_ds.file_path",
        "model.data.validation_ds.file_path",
    }
    keys = {one["key"]: one for one in config["keys"]}
    assert {keys[key]["verdict"] for key in config["missing"]} == {"to be given"}
    assert keys["trainer.spin.max_iterations"] == {
        "key": "trainer.spin.max_iterations",
        "value": 3,
        "verdict": "honoured",
        "says": "",
    }
    assert keys["model.spin.rollout_micro_batch_size"]["says"] == "model.spin.rollout_batch_size = 4"
    assert keys["model.spin.offload_adam_states"]["verdict"] == "no effect"
    assert keys["model.spin.length_params.max_length"]["says"] == "with the length that the checkpoint says"
    assert "model.tensor_model_parallel_size" not in keys and "the checkpoint's is taken" in config["notes"][0]


def test_everything_that_is_wrong_is_named_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside each other: unknown keys, unread ones, types, ranges, what does not fit together, interpolations."""
    overrides = [
        "model.mcore_gpt=false",
        "model.spin.nonsense=1",
        "trainer.precision=16",
        "model.optim.betas=3",
        "trainer.devices=3",
        "model.seed=${no.such}",
        "trainer.max_time=tomorrow",
        "model.data.train_ds.prompt_template=x",
    ]
    code, found = doctor(capsys, "--config", str(ALIGNERS), *overrides)
    assert code == 2
    keys = {one["key"]: one for one in found["config"]["keys"]}
    refused = {key for key, one in keys.items() if one["verdict"] == "refused"}
    expected = {override.partition("=")[0] for override in overrides}
    # the time limit and the template are handed on by interpolation; batches do not divide by 3 x 8 processes
    expected = expected - {"trainer.max_time", "trainer.devices"} | {
        "exp_manager.max_time_per_run",
        "model.global_batch_size",
        "model.data.validation_ds.prompt_template",
    }
    assert refused == expected
    assert len(found["config"]["refused"]) == len(refused)
    assert set(found["config"]["missing"]) >= {"pretrained_checkpoint.restore_from_path"}
    assert main(["doctor", "--config", str(ALIGNERS), *overrides]) == 2
    out = capsys.readouterr().out
    assert "A run would refuse this configuration, for 9 of its keys." in out
    assert all(keys[key]["says"] in out for key in refused)


def test_a_file_that_builds_on_the_shipped_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("defaults: [gpt_spin, _self_]\ntrainer: {devices: 2}\nmodel: {data: {chat: true}}\n")
    given = ["pretrained_checkpoint.restore_from_path=/no/such.nemo", "model.data.train_ds.file_path=/no/such.jsonl"]
    assert main(["doctor", "--config", str(mine), *given]) == 0
    out = capsys.readouterr().out
    assert "trainer.devices = 2" in out and out.endswith("A run would accept this configuration.\n")
    mine.write_text("defaults: [gpt_spin, _self_]\nexp_manager: 3\n")
    assert doctor(capsys, "--config", str(mine))[1]["config"]["refused"] == [
        "exp_manager = 3 must be a mapping of keys to values."
    ]
    for bad, says in {"[1": "mine.yaml", "- a": "mine.yaml"}.items():
        mine.write_text(bad)
        assert main(["doctor", "--config", str(mine)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and says in error and error.count("\n") == 1
    assert main(["doctor", "--config", str(tmp_path)]) == 2
    assert "is not a YAML file" in capsys.readouterr().err
