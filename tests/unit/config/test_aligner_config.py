"""NeMo-Aligner's SPIN: its configuration and its launch, unchanged; what becomes of each key; what a run says of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from nemo_spin.config import (
    addable_overrides,
    check_overrides,
    config_dir,
    notices,
    parse_config,
    register_resolvers,
    resolved,
    with_defaults,
)
from nemo_spin.config.review import VERDICTS, Verdict, verdicts
from nemo_spin.config.values import in_words
from nemo_spin.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore:In 'gpt_spin':UserWarning")  # hydra, of a file without _self_
ALIGNERS = Path(__file__).resolve().parents[2] / "nemo_aligner" / "gpt_spin.yaml"
LAUNCH = [
    "trainer.num_nodes=1",
    "trainer.devices=8",
    "model.micro_batch_size=1",
    "model.global_batch_size=64",
    "pretrained_checkpoint.restore_from_path=/models/sft.nemo",
    "model.data.train_ds.file_path=/data/train.jsonl",
    "model.data.validation_ds.file_path=/data/validation.jsonl",
    "exp_manager.create_wandb_logger=false",
    "exp_manager.wandb_logger_kwargs.project=spin_training",
    "exp_manager.wandb_logger_kwargs.name=spin_training",
    "exp_manager.explicit_log_dir=/results",
    "trainer.spin.max_iterations=1",
    "trainer.spin.max_epochs=1",
    "model.spin.ref_policy_kl_penalty=0.1",
    "model.spin.length_params.max_length=2048",
    "model.data.train_ds.max_seq_length=4096",
]
# what a run with that configuration says, without the keys' values
NOTED = {
    "model.spin.offload_adam_states",
    "model.optim.bucket_cap_mb",
    "model.data.num_workers",
    "model.data.train_ds.drop_last",
    "model.data.validation_ds.drop_last",
    "model.data.train_ds.truncation_field",
    "model.data.validation_ds.truncation_field",
    "exp_manager.checkpoint_callback_params.filename",
    "model.tensor_model_parallel_size",
    "model.pipeline_model_parallel_size",
}


def composed(*overrides: str, path: Path = ALIGNERS) -> DictConfig:
    """As hydra gives it to `run_training`."""
    check_overrides(overrides)
    register_resolvers()
    with initialize_config_dir(str(path.parent), version_base="1.1"):
        return with_defaults(compose(path.stem, addable_overrides(overrides)))


def judged(*overrides: str, path: Path = ALIGNERS) -> dict[str, Verdict]:
    return {verdict.key: verdict for verdict in verdicts(resolved(composed(*overrides, path=path)))}


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict) and key not in ("overwrite_base_config", "wandb_logger_kwargs"):
            yield from leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def test_the_documented_launch_means_what_it_meant() -> None:
    cfg = parse_config(composed(*LAUNCH))
    assert (cfg.parallel.world_size, cfg.parallel.data_parallel_size, cfg.parallel.accelerator) == (8, 8, "gpu")
    assert (cfg.micro_batch_size, cfg.global_batch_size, cfg.seed, cfg.precision) == (1, 64, 1234, "bf16")
    assert (cfg.loop.max_iterations, cfg.loop.max_epochs, cfg.loop.max_steps) == (1, (1,), -1)
    assert (cfg.loop.val_check_interval, cfg.loop.save_interval, cfg.loop.gradient_clip_val) == (0.1, 100, 1.0)
    assert (cfg.loop.limit_train_batches, cfg.loop.limit_val_batches, cfg.loop.max_seconds) == (1.0, 1.0, None)
    assert cfg.spin.ref_policy_kl_penalty == (0.1,)
    assert cfg.spin.sampling_params.end_strings == ("<|endoftext|>", "<extra_id_1>")
    assert (cfg.spin.length_params.max_length, cfg.spin.length_params.min_length) == (2048, 1)
    assert cfg.optim.distributed and cfg.optim.lr == (9e-6,) and cfg.optim.betas == (0.9, 0.98)
    assert (cfg.optim.sched.warmup_steps, cfg.optim.sched.constant_steps, cfg.optim.sched.min_lr) == (10, 1000, 9e-7)
    assert cfg.checkpoint.save_top_k == 3 and cfg.checkpoint.save_nemo_on_train_end
    assert cfg.train_ds.file_path == ("/data/train.jsonl",) and cfg.train_ds.max_seq_length == 4096
    assert cfg.validation_ds is not None and cfg.validation_ds.file_path == ("/data/validation.jsonl",)
    assert (cfg.train_ds.shuffle, cfg.validation_ds.shuffle, cfg.train_ds.overlong) == (True, False, "refuse")
    assert cfg.train_ds.chat_prompt_tokens.end_of_turn == "\n"


def test_every_key_of_the_file_is_judged_and_what_is_not_honoured_is_noted() -> None:
    found = judged(*LAUNCH)
    assert set(found) >= {key for key, _ in leaves(yaml.safe_load(ALIGNERS.read_text())) if key != "defaults"}
    assert {verdict.verdict for verdict in found.values()} <= set(VERDICTS)
    said = notices(resolved(composed(*LAUNCH)))
    assert len(said) == 7
    assert {key for key in found if any(f"{key} " in line for line in said)} == NOTED
    for verdict in found.values():
        assert (verdict.verdict != "honoured") == (verdict.key in NOTED) or verdict.key.endswith("parallel_size")


def test_the_shipped_configurations_have_nothing_to_note() -> None:
    for name in ("gpt_spin", "gpt_spin_tiny"):
        path = config_dir() / f"{name}.yaml"
        assert notices(resolved(composed(path=path))) == []
        assert {verdict.verdict for verdict in judged(path=path).values()} == {"honoured"}


@pytest.mark.parametrize("sign", ["", "+", "++"])
def test_every_key_can_be_overridden_in_either_configuration(sign: str) -> None:
    """Hydra's struct mode would refuse keys that a file lacks, and `+` those that it has."""
    mine = config_dir() / "gpt_spin.yaml"
    theirs = yaml.safe_load(ALIGNERS.read_text())
    for keys_of, path in ((theirs, mine), (yaml.safe_load(mine.read_text()), ALIGNERS)):
        given = {key: value for key, value in leaves(keys_of) if isinstance(value, bool | int | float) and "." in key}
        assert len(given) > 40
        cfg = composed(*(f"{sign}{key}={in_words(value)}" for key, value in given.items()), path=path)
        assert {key: OmegaConf.select(cfg, key) for key in given} == given


@pytest.mark.parametrize(
    ("override", "verdict", "note"),
    [
        ("model.spin.rollout_micro_batch_size=4", "translated", "is taken as model.spin.rollout_batch_size = 4"),
        ("model.spin.generation_batch_size=4", "translated", "is taken as model.spin.rollout_batch_size = 4"),
        ("trainer.max_time=00:04:00:00", "honoured", None),  # the file hands it on to max_time_per_run itself
        ("model.spin.offload_adam_states=false", "honoured", None),
        ("model.megatron_amp_O2=false", "no effect", "in bf16 the main parameters are fp32 in any case"),
        ("model.optim.overlap_grad_sync=true", "no effect", "megatron-core lays out the gradients"),
        ("model.optim.contiguous_grad_buffer=false", "no effect", "megatron-core lays out the gradients"),
        ("model.data.num_workers=0", "honoured", None),
        ("model.data.train_ds.memmap_workers=4", "no effect", "tokenized once"),
        ("model.data.train_ds.min_seq_length=5", "no effect", "no example is left out for being short"),
        ("model.data.train_ds.drop_last=false", "honoured", None),
        ("model.data.train_ds.index_mapping_dir=/idx", "no effect", "model.data.cache_dir"),
        ("model.data.validation_ds.global_batch_size=8", "no effect", "batches of model.global_batch_size"),
        ("model.data.validation_ds.micro_batch_size=8", "no effect", "micro-batches of model.micro_batch_size"),
        ("exp_manager.create_checkpoint_callback=false", "no effect", "checkpoints are written in any case"),
        ("exp_manager.checkpoint_callback_params.model_parallel_size=16", "no effect", "the layout is that of"),
        ("model.overwrite_base_config.data.train_ds.file_path=false", "no effect", "gives the architecture and not"),
        ("model.ub_tp_comm_overlap_cfg.qkv_fprop=1", "no effect", "not overlapped by TransformerEngine"),
        ("model.transformer_engine=false", "no effect", "used when it is installed"),
        ("model.hidden_dropout=0.0", "honoured", None),
        ("model.mcore_gpt=false", "refused", "model.mcore_gpt = false is not supported"),
        ("model.hidden_dropout=0.1", "refused", "there is no dropout"),
        ("model.data.sample=true", "refused", "every example is used once in an epoch"),
        ("model.data.dataloader_type=cyclic", "refused", "every example is used once in an epoch"),
        ("trainer.max_steps=10", "refused", "trainer.spin.max_steps is what counts"),
        ("exp_manager.resume_from_checkpoint=/ckpt", "refused", "resume_if_exists resumes from the last one"),
        ("exp_manager.checkpoint_callback_params.always_save_nemo=true", "refused", "once, at the end of the run"),
    ],
)
def test_what_becomes_of_a_key(override: str, verdict: str, note: str | None) -> None:
    """An override of NeMo-Aligner's file: what is not honoured is said by a run, or ends it."""
    key = override.partition("=")[0]
    cfg = composed(*LAUNCH, override)
    found = judged(*LAUNCH, override)
    known_as = next(name for name in found if key == name or key.startswith(f"{name}."))
    assert found[known_as].verdict == verdict
    if verdict == "refused":
        with pytest.raises(ConfigError, match=note):
            parse_config(cfg)
        return
    parse_config(cfg)
    said = [line for line in notices(resolved(cfg)) if f"{known_as} = " in line]
    assert len(said) == (note is not None) and all(note in line for line in said)


def test_what_a_translated_key_does() -> None:
    assert parse_config(composed(*LAUNCH)).spin.rollout_batch_size is None
    cfg = parse_config(composed(*LAUNCH, "model.spin.rollout_micro_batch_size=4", "trainer.max_time=01:02:03:04"))
    assert cfg.spin.rollout_batch_size == 4
    assert cfg.loop.max_seconds == ((1 * 24 + 2) * 60 + 3) * 60 + 4

    mine = config_dir() / "gpt_spin.yaml"
    given = [*LAUNCH, "trainer.max_time=00:00:01:00"]
    assert parse_config(composed(*given, path=mine)).loop.max_seconds == 60
    (note,) = notices(resolved(composed(*given, path=mine)))
    assert note == "trainer.max_time = 00:00:01:00 is taken as exp_manager.max_time_per_run = 00:00:01:00"
    given.append("exp_manager.max_time_per_run=00:00:02:00")
    assert parse_config(composed(*given, path=mine)).loop.max_seconds == 120
    (note,) = notices(resolved(composed(*given, path=mine)))
    assert "trainer.max_time = 00:00:01:00 has no effect: exp_manager.max_time_per_run = 00:00:02:00" in note


@pytest.mark.parametrize(
    ("overrides", "overlong", "note"),
    [
        (["model.data.chat=false"], "truncate", "taken as model.data.train_ds.overlong = truncate"),
        (["model.data.chat=true"], "refuse", "chats are not cut"),
        (["model.data.chat=false", "model.data.train_ds.overlong=drop"], "drop", "overlong = drop is what counts"),
        (["model.data.chat=false", "model.data.train_ds.overlong=truncate"], "truncate", None),
        (["model.data.chat=false", "model.data.train_ds.truncation_field=null"], "refuse", None),
    ],
)
def test_a_field_that_may_be_cut_is_cut_as_by_nemo(overrides: list[str], overlong: str, note: str | None) -> None:
    cfg = composed(*LAUNCH, *overrides)
    assert parse_config(cfg).train_ds.overlong == overlong
    said = [line for line in notices(resolved(cfg)) if "train_ds.truncation_field" in line]
    assert len(said) == (note is not None) and all(note in line for line in said)


def test_lengths_and_layouts_that_the_checkpoint_says() -> None:
    assert parse_config(composed(*LAUNCH[:-2])).spin.length_params.max_length == 0, "not known yet"
    cfg = composed(*LAUNCH[:-2], "model.encoder_seq_length=101", "model.tensor_model_parallel_size=4")
    assert parse_config(cfg).spin.length_params.max_length == 50
    assert resolved(cfg)["exp_manager"]["checkpoint_callback_params"]["model_parallel_size"] is None
    (note,) = [line for line in notices(resolved(cfg)) if "not given" in line]
    assert note.startswith("model.pipeline_model_parallel_size is not given: the checkpoint's is taken")
