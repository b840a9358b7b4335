"""Values that no YAML of a person holds: each is refused in a sentence that names the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from nemo_spin.cli.train import run_hydra, run_training
from nemo_spin.config import config_dir, parse_config, resolved
from nemo_spin.config.composing import composing
from nemo_spin.config.review import notices
from nemo_spin.errors import ConfigError

GIVEN = {"pretrained_checkpoint.restore_from_path": "sft.nemo", "model.data.train_ds.file_path": "train.jsonl"}


def shipped(**changes: Any) -> Any:
    """The shipped configuration as plain mappings, with changes by full key ("__" for ".")."""
    cfg = OmegaConf.to_container(OmegaConf.load(config_dir() / "gpt_spin.yaml"))
    for key, value in (GIVEN | {key.replace("__", "."): value for key, value in changes.items()}).items():
        *sections, name = key.split(".")
        node = cfg
        for section in sections:
            node = node[section]
        node[name] = value
    return cfg


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth else 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model__seed": 10**400}, "model.seed is a number of 1329 bits"),
        ({"model__seed": 16**5000}, "model.seed is a number of 20001 bits"),  # Python refuses to print it
        ({"model__spin__ref_policy_kl_penalty": [10**400]}, "model.spin.ref_policy_kl_penalty is a number"),
        ({"model__optim__betas": b"\x00\x00"}, "model.optim.betas is of the type bytes"),
        ({"model__data__train_ds__weights": b"\x01"}, "model.data.train_ds.weights is of the type bytes"),
        ({"model__data__cache_dir": "\ud800"}, "model.data.cache_dir holds half of a surrogate pair"),
        ({"model__spin__sampling_params__end_strings": ["a\0"]}, "end_strings holds a NUL character"),
        ({"model__optim__lr": nested(50)}, "model.optim.lr is nested more than 32 levels"),
        ({"model__optim__lr": nested(900)}, "model.optim.lr is nested more than 32 levels"),
        ({"exp_manager__wandb_logger_kwargs": {1: 2}}, "wandb_logger_kwargs has the key 1"),
        ({"exp_manager__wandb_logger_kwargs": {b"k": 2}}, r"wandb_logger_kwargs has the key b'k'"),
        ({"exp_manager__wandb_logger_kwargs": {"\ud800": 2}}, r"wandb_logger_kwargs has the key '\\ud800'"),
        ({"model__": 2}, "model has the key ''"),
        ({"model": []}, r"model = \[\] must be a mapping"),
        ({"trainer": "x" * 9000}, "trainer = 'x{200,300}... must be a mapping"),
        # would take the memory, or the afternoon
        (
            {"trainer__spin__max_iterations": 10**12},
            "max_iterations = 1000000000000: use a whole number of at least 1 a",
        ),
        ({"trainer__devices": "${multiply:ab,99999999999}"}, "trainer.devices cannot be resolved: .*needs two numbers"),
        ({"trainer__devices": "${int_div:1,0}"}, "trainer.devices cannot be resolved: ZeroDivisionError"),
        (
            {"trainer__devices": "${model.seed}", "model__seed": "${trainer.devices}"},
            "cannot be resolved|refers to itself",
        ),
        ({"exp_manager__max_time_per_run": "9999999999:0:0:0"}, "max_time_per_run = '9999999999:0:0:0': use DD"),
        ({"exp_manager__max_time_per_run": "9" * 5000 + ":0:0:0"}, "max_time_per_run = '999.*: use DD"),
        # what NeMo's exp_manager gets
        ({"exp_manager__name": 5}, "exp_manager.name = 5: use a text"),
        ({"exp_manager__explicit_log_dir": ["a"]}, r"exp_manager.explicit_log_dir = \['a'\]: use a text"),
        ({"exp_manager__wandb_logger_kwargs": "a"}, "wandb_logger_kwargs = 'a': use a mapping"),
        ({"exp_manager__files_to_copy": "a"}, "files_to_copy = 'a': use a list"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_refused_in_one_sentence(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as refusal:
        parse_config(shipped(**changes))
    sentence = str(refusal.value)
    assert "\n" not in sentence and len(sentence) < 1000
    sentence.encode()


@pytest.mark.parametrize("cfg", [None, [], 3, "a", {None: 1}, {"": 1}, {".": 1}])
def test_what_is_no_configuration(cfg: Any) -> None:
    with pytest.raises(ConfigError, match="the configuration "):
        parse_config(cfg)


def test_long_values_are_cut_where_they_are_shown() -> None:
    cfg = resolved(shipped(model__data__train_ds__index_mapping_dir="/a" * 5000))
    assert max(map(len, notices(cfg))) < 1000


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"trainer: " + b"9" * 5000, "Exceeds the limit"),
        (b"[" * 5000, "nested too deeply"),
        (b"a: &a [*a]", "nested too deeply, or refers to itself"),
        (b"\xff\xfea", "can't decode byte 0xff"),
        (b"null: 1", "cannot be read: "),
        (b"- a", "must be a DictConfig"),
        (b"a: b: c", "is not valid YAML"),
        (b"a: !!python/name:os.system", "is not valid YAML"),
    ],
)
def test_a_file_that_hydra_cannot_read(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "run.yaml").write_bytes(content)
    with (
        pytest.raises(ConfigError, match=says) as refusal,
        composing("run.yaml"),
        initialize_config_dir(str(tmp_path), version_base="1.1"),
    ):
        compose("run")
    assert "\n" not in str(refusal.value)


def test_only_reading_is_explained(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What training raises is a bug, with its traceback; what reading raises is a sentence."""

    def reads() -> None:
        raise ValueError("Exceeds the limit")

    assert run_hydra(reads, ["train"]) == 2
    assert "the configuration cannot be read: Exceeds the limit" in capsys.readouterr().err

    def broken(cfg: Any) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr("nemo_spin.config.with_defaults", broken)
    with pytest.raises(ValueError, match="a bug"):
        run_hydra(lambda: run_training({}), ["train"])
