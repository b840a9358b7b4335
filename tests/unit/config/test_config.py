from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from nemo_spin.config import (
    check_overrides,
    config_dir,
    parse_config,
    register_resolvers,
    with_checkpoint,
    with_defaults,
)
from nemo_spin.config.parse import defaults
from nemo_spin.errors import ConfigError

REQUIRED = {
    "pretrained_checkpoint.restore_from_path": "sft.nemo",
    "model.data.train_ds.file_path": "train.jsonl",
}


def shipped(**changes: Any) -> DictConfig:
    """The shipped configuration with what has to be given, 3 iterations, and changes by full key ("__" for ".")."""
    cfg = OmegaConf.load(config_dir() / "gpt_spin.yaml")
    given = REQUIRED | {"trainer.spin.max_iterations": 3}
    for key, value in (given | {key.replace("__", "."): value for key, value in changes.items()}).items():
        OmegaConf.update(cfg, key, value, force_add=True)
    return cfg


@pytest.mark.parametrize("name", ["gpt_spin", "gpt_spin_tiny"])
def test_shipped_configurations_run_as_they_are(name: str) -> None:
    with initialize_config_dir(str(config_dir()), version_base="1.1"):
        cfg = parse_config(compose(name, [f"{key}={value}" for key, value in REQUIRED.items()]))
    assert len(cfg.spin.ref_policy_kl_penalty) == len(cfg.optim.lr) == cfg.loop.max_iterations
    assert cfg.validation_ds is None and cfg.tokenizer is None and cfg.encoder_seq_length is None
    assert cfg.train_ds.prompt_template == "{input} {output}"
    assert (cfg.parallel.world_size, cfg.parallel.data_parallel_size) == (1, 1)
    tiny = name == "gpt_spin_tiny"
    assert (cfg.precision, cfg.parallel.accelerator) == (("32", "cpu") if tiny else ("bf16", "auto"))
    assert cfg.spin.sampling_params.temperature == 1.0


def test_an_absent_key_has_the_default_of_the_shipped_file() -> None:
    shipped_file = OmegaConf.load(config_dir() / "gpt_spin.yaml")
    for key, value in REQUIRED.items():
        OmegaConf.update(shipped_file, key, value)
    given = OmegaConf.create({})
    for key, value in (REQUIRED | {"model.data.validation_ds.file_path": None}).items():
        OmegaConf.update(given, key, value, force_add=True)
    assert parse_config(given) == parse_config(shipped_file)
    with pytest.raises(ConfigError, match="is missing"):
        parse_config({})
    assert with_defaults({}).model.tensor_model_parallel_size is None, "of NeMo-Aligner: the checkpoint's"
    assert defaults()["model"]["tensor_model_parallel_size"] == 1
    # What validation lacks is as in training.
    both = {"model__data__train_ds__prompt_template": "{input}{output}", "model__data__train_ds__max_seq_length": 9}
    cfg = shipped(**both, model__data__validation_ds__file_path="validation.jsonl")
    cfg.model.data.validation_ds = {"file_path": "validation.jsonl", "max_seq_length": None}
    validation = parse_config(cfg).validation_ds
    assert validation is not None and validation.prompt_template == "{input}{output}"
    assert (validation.max_seq_length, validation.shuffle, validation.weights) == (None, False, None)


def test_a_configuration_is_completed_with_what_the_checkpoint_says() -> None:
    given = {"model": {"spin": {"length_params": {"max_length": "${int_div:${model.encoder_seq_length}, 2}"}}}}
    cfg = OmegaConf.create(given | {"trainer": {"devices": 4}})
    for key, value in REQUIRED.items():
        OmegaConf.update(cfg, key, value, force_add=True)
    before = OmegaConf.to_yaml(cfg)
    parsed, complete = with_checkpoint(cfg, 101, (2, 1))
    assert OmegaConf.to_yaml(cfg) == before
    assert (str(parsed.parallel), parsed.encoder_seq_length) == ("TP 2 x PP 1 x DP 2", 101)
    assert parsed.spin.length_params.max_length == complete.model.spin.length_params.max_length == 50
    assert complete.model.tensor_model_parallel_size == 2 and complete.trainer.spin.save_interval == 100
    OmegaConf.set_struct(cfg, True)
    cfg.trainer.devices = 1
    assert str(with_checkpoint(cfg, 101, None)[0].parallel) == "TP 1 x PP 1 x DP 1"


def test_null_switches_a_guard_off_and_no_section_means_the_shipped_thresholds() -> None:
    cfg = shipped(model__spin__guards__entropy=None, model__spin__guards__empty=1)
    guards = parse_config(cfg).spin.guards
    assert (guards.entropy, guards.empty, guards.repeated) == (None, 1.0, 0.05)
    del cfg.model.spin["guards"]
    assert parse_config(cfg).spin.guards == parse_config(shipped()).spin.guards


def test_resolvers_and_plain_mappings() -> None:
    register_resolvers()
    cfg = shipped(model__encoder_seq_length=101)
    cfg.model.spin.length_params.max_length = "${int_div:${model.encoder_seq_length}, 2}"
    plain = OmegaConf.to_container(cfg, resolve=True)
    assert parse_config(plain).spin.length_params.max_length == 50
    assert dataclasses.replace(parse_config(plain), seed=0) == dataclasses.replace(parse_config(cfg), seed=0)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        # unknown keys, with the nearest known one
        ({"trainer__spin__max_iteration": 2}, "unknown key trainer.spin.max_iteration: .*trainer.spin.max_iterations"),
        ({"model__spin__rollout_batchsize": 2}, "rollout_batchsize: .*model.spin.rollout_batch_size"),
        ({"model__spin__max_iterations": 2}, "did you mean trainer.spin.max_iterations"),
        ({"model__spin__num_rollout_samples": 2}, "use model.spin.rollout_window"),
        ({"model__spin__sampling_params__topk": 2}, "did you mean model.spin.sampling_params.top_k"),
        ({"model__hidden_size": 2}, "the architecture comes from the checkpoint"),
        ({"model__optim__sched__max_steps": 2}, "unknown key model.optim.sched.max_steps"),
        ({"model__data__train_ds__path": "x"}, "did you mean model.data.train_ds.file_path"),
        ({"trainer__spin": 3}, "trainer.spin = 3 must be a mapping"),
        # known ones that ask for what is not done
        ({"model__virtual_pipeline_model_parallel_size": 2}, "virtual_pipeline_model_parallel_size = 2 is not supp"),
        ({"model__context_parallel_size": 2}, "context_parallel_size = 2 is not supported"),
        ({"model__expert_model_parallel_size": 2}, "expert_model_parallel_size = 2 is not supported"),
        ({"model__peft": {"peft_scheme": "lora"}}, "all parameters are trained"),
        ({"trainer__max_steps": 10}, "trainer.spin.max_steps is what counts"),
        ({"trainer__enable_checkpointing": True}, "trainer.spin.save_interval"),
        (
            {"model__data__chat_prompt_tokens": {"turn_end": "x"}},
            "did you mean model.data.chat_prompt_tokens.turn_start",
        ),
        ({"model__data__chat_prompt_tokens": {"turn_start": 1}}, "chat_prompt_tokens.turn_start = 1: use a text"),
        ({"model__data__train_ds__file_path": []}, "train_ds.file_path = ..: name at least one file"),
        ({"model__data__train_ds__file_path": ["a", 1]}, "train_ds.file_path = .*list of texts"),
        ({"model__data__train_ds__weights": [1, 2]}, "train_ds.weights = .1, 2.: .* of which there are 1"),
        ({"model__data__train_ds__weights": [0]}, "train_ds.weights = .0.: give a number above 0"),
        ({"model__data__validation_ds__weights": [1]}, "unknown key model.data.validation_ds.weights"),
        ({"model__data__train_ds__on_bad_record": "ignore"}, "on_bad_record = 'ignore': use one of error, skip"),
        ({"model__data__train_ds__overlong": "truncate"}, "train_ds: overlong: truncate needs a truncation_field"),
        (
            {
                "model__data__train_ds__overlong": "truncate",
                "model__data__train_ds__truncation_field": "output",
            },
            "train_ds: truncation_field 'output' is not a field of the prompt: name some of input",
        ),
        (
            {"model__data__validation_ds__global_batch_size": 3, "trainer__spin__limit_val_batches": 2},
            "validation_ds.global_batch_size = 3 is not supported, validation has batches of model.global_batch_size",
        ),
        ({"model__data__train_ds__global_batch_size": 3}, "model.global_batch_size is what counts"),
        # what is missing
        ({"model__data__validation_ds__file_path": "???"}, "validation_ds.file_path is missing: .* null for no valid"),
        ({"pretrained_checkpoint__restore_from_path": None}, "pretrained_checkpoint.restore_from_path is missing"),
        ({"model__data__train_ds__file_path": "???"}, "model.data.train_ds.file_path is missing"),
        ({"model__global_batch_size": None}, "model.global_batch_size is missing"),
        # types and ranges
        ({"trainer__spin__max_iterations": 0}, "max_iterations = 0: use a whole number of at least 1"),
        ({"trainer__spin__max_epochs": 1.0}, "max_epochs = 1.0: use a whole number"),
        ({"trainer__spin__max_epochs": True}, "max_epochs = True: use a whole number"),
        ({"trainer__spin__max_steps": 0}, "max_steps = 0: use -1 for no limit"),
        ({"trainer__spin__limit_train_batches": 2.0}, "limit_train_batches = 2.0: use a number of batches"),
        ({"trainer__spin__limit_train_batches": 0}, "limit_train_batches = 0: use a number of batches of at least 1"),
        ({"trainer__spin__val_check_interval": -1}, "val_check_interval = -1: use a number of steps"),
        ({"trainer__spin__gradient_clip_val": math.inf}, "gradient_clip_val = inf: use a finite number"),
        ({"trainer__spin__max_skipped_steps": -1}, "max_skipped_steps = -1: use a whole number of at least 0"),
        ({"model__spin__guards__empty": 0}, "model.spin.guards.empty = 0: use a finite number above 0 and at most 1"),
        ({"model__spin__guards__cut_off": 10}, "guards.cut_off = 10: use a finite number above 0 and at most 1"),
        ({"model__spin__guards__entropy": "low"}, "guards.entropy = 'low': use a finite number above 0"),
        ({"model__spin__guards__blank": 0.1}, "unknown key model.spin.guards.blank"),
        ({"trainer__precision": "16"}, "trainer.precision = '16': use bf16"),
        ({"trainer__accelerator": "tpu"}, "trainer.accelerator = 'tpu': use one of auto, gpu, cpu"),
        ({"trainer__devices": "auto"}, "trainer.devices = 'auto': use a whole number"),
        ({"model__seed": -1}, "model.seed"),
        ({"model__sequence_parallel": "yes"}, "model.sequence_parallel = 'yes': use true or false"),
        ({"model__optim__name": "sgd"}, "model.optim.name = 'sgd': use one of adam"),
        (
            {"model__spin__generation_engine": "vllm"},
            "generation_engine = 'vllm': use one of auto, nemo_spin, megatron",
        ),
        ({"model__optim__lr": 0.0}, "model.optim.lr = 0.0: use a finite number above 0"),
        ({"model__optim__lr": "9e-6"}, "model.optim.lr = '9e-6': use a finite number above 0"),
        ({"model__optim__lr": 5e-8}, "model.optim.sched.min_lr = .* must not be above the learning rate"),
        ({"model__optim__betas": [0.9, 1.0]}, "model.optim.betas"),
        ({"model__optim__sched__name": "Step"}, "sched.name = 'Step': use one of CosineAnnealing"),
        ({"model__data__train_ds__overlong": "cut"}, "overlong = 'cut': use one of refuse, drop"),
        ({"model__data__train_ds__prompt_template": "{input}"}, "model.data.train_ds: .*lacks {output}"),
        ({"model__data__train_ds__add_sep": True}, "add_sep = true is not supported, .*: remove it"),
        ({"model__spin__sampling_params__temperature": 0}, "temperature = 0: use a finite number above 0"),
        ({"model__spin__sampling_params__top_p": 1.5}, "top_p = 1.5: use a finite number above 0 and at most 1"),
        ({"model__spin__sampling_params__end_strings": "x"}, "end_strings = 'x': use a list"),
        (
            {"model__spin__sampling_params__add_BOS": True},
            "add_BOS = true is not supported, a response continues .*: remove",
        ),
        ({"model__activations_checkpoint_granularity": "some"}, "use one of selective, full"),
        ({"exp_manager__resume_if_exists": "maybe"}, "exp_manager.resume_if_exists = 'maybe'"),
        # beta: positive, finite, and as many as there are iterations
        ({"model__spin__ref_policy_kl_penalty": None}, "ref_policy_kl_penalty is missing"),
        ({"model__spin__ref_policy_kl_penalty": 0.0}, "ref_policy_kl_penalty = 0.0: use a finite number above 0"),
        ({"model__spin__ref_policy_kl_penalty": math.nan}, "ref_policy_kl_penalty = nan: use a finite number above 0"),
        ({"model__spin__ref_policy_kl_penalty": [1.0, 1.0, -1.0]}, "use finite numbers above 0"),
        ({"model__spin__ref_policy_kl_penalty": [0.1, 0.2]}, "it has 2 values for trainer.spin.max_iterations = 3"),
        ({"model__spin__ref_policy_kl_penalty": [0.1] * 4}, "it has 4 values for trainer.spin.max_iterations = 3"),
        ({"model__optim__lr": [1e-5]}, "it has 1 values for trainer.spin.max_iterations = 3"),
        # schedules: as many values as there are iterations, and none that contradicts another key
        ({"trainer__spin__max_epochs": [1, 2]}, "max_epochs = .1, 2.: it has 2 values for .*max_iterations = 3"),
        ({"trainer__spin__max_epochs": [1, 0, 1]}, "max_epochs = .*: use whole numbers of at least 1"),
        ({"model__spin__sampling_params__temperature": [1.0, 0.7]}, "temperature = .*it has 2 values"),
        (
            {"model__spin__sampling_params__temperature": [1.0, 0.7, 0.0]},
            "temperature = .*: use finite numbers above 0",
        ),
        (
            {"model__spin__sampling_params__use_greedy": True, "model__spin__sampling_params__temperature": [1, 1, 2]},
            "temperature = .1, 1, 2.: it contradicts use_greedy",
        ),
        # replay and several responses
        (
            {"model__spin__replay_iterations": 3},
            "replay_iterations = 3: the last of .*max_iterations = 3 has 2 before it",
        ),
        ({"model__spin__replay_iterations": -1}, "replay_iterations = -1: use a whole number of at least 0"),
        (
            {"model__spin__replay_iterations": 2, "model__spin__replay_weights": [1]},
            "for each of the replay_iterations = 2",
        ),
        ({"model__spin__replay_weights": [0]}, "replay_weights = .0.: give a number above 0"),
        (
            {"model__spin__replay_iterations": 0, "model__spin__replay_weights": [1]},
            "for each of the replay_iterations = 0",
        ),
        ({"model__spin__num_generations": 0}, "num_generations = 0: use a whole number of at least 1"),
        (
            {"model__spin__num_generations": 2, "model__spin__sampling_params__use_greedy": True},
            "num_generations = 2: greedy decoding makes the same response each time",
        ),
        (
            {"model__spin__num_generations": 2, "model__spin__first_rollouts_from_data": True},
            "num_generations = 2: the data bring one response to each prompt",
        ),
        ({"model__spin__rejected_selection": "best"}, "rejected_selection = 'best': with num_generations = 1"),
        ({"model__spin__rejected_selection": "median"}, "rejected_selection = 'median': use one of all, best, worst"),
        # losses
        ({"model__spin__loss_type": "ipo"}, "loss_type = 'ipo': use one of logistic, hinge, exponential, correlation"),
        ({"model__spin__label_smoothing": 0.5}, "label_smoothing = 0.5: use a number from 0 to below 0.5"),
        ({"model__spin__sft_loss_weight": -1}, "sft_loss_weight = -1: use a finite number at least 0"),
        # the end of the run
        (
            {"trainer__spin__stop_at_equilibrium__accuracy": 0.4},
            "accuracy = 0.4: use a finite number at least 0.5 and at",
        ),
        ({"trainer__spin__stop_at_equilibrium__logps_gap": 0}, "logps_gap = 0: use a finite number above 0"),
        (
            {"trainer__spin__stop_at_equilibrium__exact_match": 2},
            "exact_match = 2: use a finite number above 0 and at most",
        ),
        ({"trainer__spin__stop_at_equilibrium__kl": 2}, "unknown key trainer.spin.stop_at_equilibrium.kl"),
        (
            {"trainer__spin__stop_at_equilibrium__accuracy": 0.6, "model__spin__held_out_rollouts": 0},
            "stop_at_equilibrium needs held-out responses: set model.spin.held_out_rollouts above 0",
        ),
        (
            {
                "trainer__spin__stop_at_equilibrium__accuracy": 0.6,
                "model__spin__held_out_rollouts": 8,
                "model__spin__refresh_reference": False,
            },
            "stop_at_equilibrium contradicts model.spin.refresh_reference = false",
        ),
        # RMSProp
        ({"model__optim__name": "rmsprop", "model__optim__weight_decay": 0.1}, "weight_decay = 0.1: .*set it to 0"),
        ({"model__optim__alpha": 1.0}, "model.optim.alpha = 1.0: use a number from 0 to below 1"),
        # what has to fit together
        ({"model__micro_batch_size": 3}, "global_batch_size = 64 is not divisible by micro_batch_size 3"),
        ({"trainer__devices": 3}, "not divisible by micro_batch_size 1 x data-parallel size 3: use a multiple of 3"),
        (
            {"trainer__devices": 6, "model__tensor_model_parallel_size": 2, "model__pipeline_model_parallel_size": 2},
            "6 processes cannot be laid out as .* 2 x .* 2: use a multiple of 4",
        ),
        ({"model__spin__rollout_window": 65}, "use null or a multiple of model.global_batch_size = 64"),
        (
            {"model__spin__sampling_params__use_greedy": True, "model__spin__sampling_params__top_k": 5},
            "top_k = 5: it contradicts use_greedy",
        ),
        (
            {"model__spin__length_params__max_length": 5, "model__spin__length_params__min_length": 6},
            "min_length = 6: it must not be above max_length = 5",
        ),
        ({"model__spin__length_params__max_length": "${no.such}"}, "length_params.max_length cannot be resolved"),
    ],
    ids=str,
)
def test_refused_in_one_sentence(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as refusal:
        parse_config(shipped(**changes))
    assert "\n" not in str(refusal.value)


def test_what_is_normalised() -> None:
    cfg = parse_config(
        shipped(
            trainer__spin__limit_val_batches=-1,
            model__sequence_parallel=True,
            model__activations_checkpoint_granularity="full",
            model__tokenizer__type="/tok",
            model__optim__sched__name="cosineannealing",
            model__spin__rollout_window=128,
            trainer__precision="fp32",
        )
    )
    assert cfg.loop.limit_val_batches == 1.0
    assert cfg.parallel.sequence_parallel is False, "without tensor parallelism there is nothing to split"
    assert dataclasses.astuple(cfg.recompute) == ("full", "uniform", 1)
    assert cfg.tokenizer is not None and cfg.tokenizer.type == "/tok"
    assert cfg.optim.sched.name == "CosineAnnealing"
    assert cfg.spin.rollout_window == 128
    assert cfg.precision == "32"


def test_one_value_is_for_all_iterations() -> None:
    cfg = parse_config(shipped(trainer__spin__max_epochs=2, model__spin__sampling_params__temperature=0.7))
    assert (cfg.loop.max_epochs, cfg.spin.temperature, cfg.spin.sampling_params.temperature) == (
        (2,) * 3,
        (0.7,) * 3,
        0.7,
    )
    listed = {"trainer__spin__max_epochs": [2, 1, 3], "model__spin__sampling_params__temperature": [1.0, 0.9, 0.8]}
    cfg = parse_config(shipped(**listed))
    assert (cfg.loop.max_epochs, cfg.spin.temperature) == ((2, 1, 3), (1.0, 0.9, 0.8))


def test_the_method_is_the_papers_unless_told_otherwise() -> None:
    spin = parse_config(shipped()).spin
    assert (spin.replay_weights, spin.num_generations, spin.refresh_reference) == ((1.0,), 1, True)
    assert dataclasses.astuple(spin.loss) == ("logistic", 0.0, 0.0, False)
    assert parse_config(shipped(model__spin__replay_iterations=0)).spin.replay_weights == ()
    # The default of 1 is not refused where there is nothing before the only iteration.
    single = {"trainer__spin__max_iterations": 1, "model__spin__ref_policy_kl_penalty": 0.1}
    assert parse_config(shipped(**single)).spin.replay_iterations == 1


def test_overrides_are_checked_before_hydra() -> None:
    check_overrides(
        [
            "trainer.spin.max_iterations=2",
            "+model.spin.sampling_params.add_BOS=false",
            "~model.tokenizer",
            "exp_manager.wandb_logger_kwargs.entity=me",
            "model.mcore_gpt=True",
            "model.data.chat_prompt_tokens.end_of_turn=x",
            "hydra.verbose=true",
            "+experiment=mine",
            "--config-name=gpt_spin_tiny",
            "no_equals_sign",
        ]
    )
    for override, hint in {
        "trainer.spin.max_iteration=2": "trainer.spin.max_iterations",
        "++model.spin.rollout_windows=2": "model.spin.rollout_window",
        "~model.spin.length_params.max_len": "model.spin.length_params.max_length",
        "trainer.spins.max_steps=1": "trainer.spin",
        "modle.spin.x=1": "model",
    }.items():
        with pytest.raises(ConfigError, match=f"unknown key .*{hint}"):
            check_overrides(["trainer.devices=1", override])


def test_the_configuration_is_found_in_the_source_tree() -> None:
    assert config_dir() == Path(__file__).resolve().parents[3] / "conf"
