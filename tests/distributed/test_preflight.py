"""Bad input is refused before weights load: one sentence, nothing written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from runs import make_checkpoint, make_data, make_tokenizer

from nemo_spin.errors import UserError
from nemo_spin.model_io.nemo1.archive import unpack


@pytest.fixture(scope="module")
def files(workers: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("preflight")
    workers.run(make_checkpoint, str(directory))
    make_data(str(directory))
    (directory / "empty.jsonl").write_text("")
    (directory / "malformed.jsonl").write_text('{"input": "a", "output": "b"}\n{"input": "a", "output": \n')
    (directory / "long.jsonl").write_text(json.dumps({"input": "4 plus 5 makes " * 40, "output": "9"}) + "\n")
    (directory / "no_checkpoint").mkdir()
    (directory / "not_a.nemo").write_text("hello")
    (directory / "used" / "checkpoints" / "a").mkdir(parents=True)
    (directory / "used" / "checkpoints" / "a" / "state.json").write_text("{}")
    (directory / "used" / "checkpoints" / "latest").write_text("a\n")
    return directory


def configuration(files: str, overrides: dict[str, Any]) -> Any:
    """A good configuration with these overrides."""
    from omegaconf import OmegaConf, open_dict

    from nemo_spin.config import config_dir

    base = OmegaConf.load(config_dir() / "gpt_spin.yaml")
    good = {
        "pretrained_checkpoint.restore_from_path": f"{files}/sft.nemo",
        "model.data.train_ds.file_path": f"{files}/train.jsonl",
        "exp_manager.explicit_log_dir": f"{files}/run",
        "trainer.accelerator": "cpu",
        "trainer.spin.max_iterations": 3,
    }
    for key, value in (good | overrides).items():
        with open_dict(base):
            OmegaConf.update(base, key, value.replace("FILES", files) if isinstance(value, str) else value)
    return base


def preflight_error(files: str, overrides: dict[str, Any]) -> str:
    """The sentence with which these overrides of a good configuration are refused; "" if they are not."""
    import nemo_spin.model as model
    from nemo_spin.commands.train import preflight

    def never(*args: Any) -> None:
        raise AssertionError("weights were loaded")

    load_weights, model.load_weights = model.load_weights, never
    try:
        preflight(configuration(files, overrides))
    except UserError as error:
        return str(error)
    finally:
        # The worker serves other tests after this one.
        model.load_weights = load_weights
    return ""


CASES = {
    "missing path": ({"pretrained_checkpoint.restore_from_path": "FILES/none.nemo"}, "none.nemo"),
    "no path": ({"pretrained_checkpoint.restore_from_path": None}, "pretrained_checkpoint.restore_from_path"),
    "no checkpoint": ({"pretrained_checkpoint.restore_from_path": "FILES/no_checkpoint"}, "no checkpoint"),
    "no archive": ({"pretrained_checkpoint.restore_from_path": "FILES/not_a.nemo"}, "not a tar archive"),
    "tp against heads": ({"model.tensor_model_parallel_size": 8, "trainer.devices": 8}, "attention heads"),
    "tp against groups": ({"model.tensor_model_parallel_size": 4, "trainer.devices": 4}, "query groups"),
    "pp against layers": ({"model.pipeline_model_parallel_size": 3, "trainer.devices": 3}, "layers"),
    "devices against layout": ({"model.tensor_model_parallel_size": 2}, "trainer.devices"),
    "global batch": ({"model.global_batch_size": 10, "model.micro_batch_size": 4}, "model.global_batch_size"),
    "short beta list": ({"model.spin.ref_policy_kl_penalty": [0.1, 0.2]}, "model.spin.ref_policy_kl_penalty"),
    "negative beta": ({"model.spin.ref_policy_kl_penalty": -0.1}, "model.spin.ref_policy_kl_penalty"),
    "short lr list": ({"model.optim.lr": [1e-5]}, "model.optim.lr"),
    "unknown loop key": ({"trainer.spin.max_iteration": 2}, "max_iterations"),
    "unknown algorithm key": ({"model.spin.rollout_batchsize": 2}, "rollout_batch_size"),
    "window": ({"model.spin.rollout_window": 100}, "model.spin.rollout_window"),
    "virtual pipeline": ({"model.virtual_pipeline_model_parallel_size": 2}, "virtual_pipeline"),
    "missing data": ({"model.data.train_ds.file_path": "FILES/none.jsonl"}, "none.jsonl"),
    "empty data": ({"model.data.train_ds.file_path": "FILES/empty.jsonl"}, "empty"),
    "malformed data": ({"model.data.train_ds.file_path": "FILES/malformed.jsonl"}, "malformed.jsonl:2"),
    "malformed validation": ({"model.data.validation_ds.file_path": "FILES/malformed.jsonl"}, "malformed.jsonl:2"),
    "long prompts": ({"model.data.train_ds.file_path": "FILES/long.jsonl"}, "by their prompt alone"),
    "earlier run": (
        {"exp_manager.explicit_log_dir": "FILES/used", "exp_manager.resume_if_exists": False},
        "resume_if_exists",
    ),
    "nothing to resume": ({"exp_manager.resume_ignore_no_checkpoint": False}, "resume_ignore_no_checkpoint"),
}


def test_the_configuration_is_good(workers: Any, files: Path) -> None:
    assert workers.run(preflight_error, str(files), {}) == [""]


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_in_a_sentence(workers: Any, files: Path, case: str) -> None:
    overrides, words = CASES[case]
    before = sorted(files.rglob("*"))
    (message,) = workers.run(preflight_error, str(files), overrides)
    assert words in message
    assert "\n" not in message
    assert sorted(files.rglob("*")) == before


def test_a_tokenizer_that_does_not_fit_is_refused(workers: Any, files: Path, tmp_path: Path) -> None:
    import sentencepiece

    text = tmp_path / "text"
    text.write_text("\n".join(chr(i) * 3 for i in range(33, 120)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "large"), vocab_size=95, minloglevel=2, hard_vocab_limit=False
    )
    tokenizer = {"model.tokenizer.library": "sentencepiece", "model.tokenizer.model": str(tmp_path / "large.model")}
    (message,) = workers.run(preflight_error, str(files), tokenizer)
    assert "32 rows" in message
    same = {"model.tokenizer.library": "sentencepiece", "model.tokenizer.model": str(make_tokenizer(tmp_path / "same"))}
    assert workers.run(preflight_error, str(files), same) == [""]


def layout(files: str, overrides: dict[str, Any]) -> str:
    from nemo_spin.commands.train import preflight

    return str(preflight(configuration(files, overrides)).cfg.parallel)


def test_a_layout_that_is_left_open_is_the_checkpoints(workers: Any, files: Path, tmp_path: Path) -> None:
    unpack(files / "sft.nemo", tmp_path)
    config = tmp_path / "model_config.yaml"
    config.write_text(config.read_text().replace("tensor_model_parallel_size: 1", "tensor_model_parallel_size: 2"))
    given = {"pretrained_checkpoint.restore_from_path": str(tmp_path), "trainer.devices": 4}
    open_sizes = {"model.tensor_model_parallel_size": None, "model.pipeline_model_parallel_size": None}
    assert workers.run(layout, str(files), given | open_sizes) == ["TP 2 x PP 1 x DP 2"]
    assert workers.run(layout, str(files), given) == ["TP 1 x PP 1 x DP 4"]
    (message,) = workers.run(preflight_error, str(files), given | open_sizes | {"trainer.devices": 1})
    assert "1 processes cannot be laid out as model.tensor_model_parallel_size 2" in message
