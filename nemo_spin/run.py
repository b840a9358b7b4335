"""A training run from its configuration: check everything, then build, train, and write the result."""

from __future__ import annotations

import dataclasses
import logging
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_spin.checkpoint.architecture import check_layout
from nemo_spin.checkpoint.source import open_checkpoint
from nemo_spin.checkpoint.training import TrainingCheckpoints
from nemo_spin.config import LOGGERS, DatasetConfig, SpinConfig, parse_config
from nemo_spin.data.dataset import SFTDataset, load_dataset
from nemo_spin.data.tokenizer import TextTokenizer
from nemo_spin.errors import ConfigError
from nemo_spin.megatron import setup
from nemo_spin.memory import MemoryEstimate, check_fits, estimate
from nemo_spin.metrics_log import FILE_NAME, MetricsLog
from nemo_spin.model import MegatronGPTSPINModel, restore_tokenizer
from nemo_spin.reporting import Reporter
from nemo_spin.time_limit import TimeLimit
from nemo_spin.tokenizers import check_tokenizer_fits
from nemo_spin.trainer import SPINTrainer

# Resuming, checkpoints and time are this package's own: exp_manager knows one file per checkpoint, not sharded ones.
_OURS = (
    "resume_if_exists", "resume_ignore_no_checkpoint", "resume_from_checkpoint", "checkpoint_callback_params",
    "max_time_per_run",
)  # fmt: skip
# logger -> the packages of which one has to be there
_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "mlflow": ("mlflow",)}


@dataclass(frozen=True)
class Inputs:
    """Everything a run needs before its weights: checked, and nothing written yet.

    context_length: most tokens of prompt and response. run_dir: where the run writes. resume_from: the checkpoint to
    go on from, if any. memory: what each device will hold.
    """

    cfg: SpinConfig
    run_dir: Path
    resume_from: Path | None
    context_length: int
    train_dataset: SFTDataset
    validation_dataset: SFTDataset | None
    memory: MemoryEstimate


def preflight(cfg: DictConfig) -> Inputs:
    """Read configuration, the checkpoint's description and the data; load no weights, write nothing.

    Raises UserError for the first thing that cannot be used.
    """
    spin = parse_config(cfg)
    run_dir = _run_dir(cfg)
    resume_from = _checkpoint_to_resume(cfg, run_dir)
    with open_checkpoint(spin.restore_from_path) as source:
        tokenizer = restore_tokenizer(source, spin.tokenizer and dataclasses.asdict(spin.tokenizer))
        architecture = source.architecture(tokenizer.vocab_size)
    check_tokenizer_fits(tokenizer, architecture.vocab_rows, spin.restore_from_path)
    parallel = spin.parallel
    check_layout(
        architecture,
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.sequence_parallel,
    )
    context_length = spin.encoder_seq_length or architecture.max_sequence_length
    if architecture.position_embedding_type == "learned_absolute" and context_length > architecture.max_sequence_length:
        raise ConfigError(
            f"model.encoder_seq_length {context_length} is more than the {architecture.max_sequence_length} positions "
            "that the checkpoint has learned: choose at most that."
        )
    train = _load(spin.train_ds, tokenizer, context_length)
    validation = _load(spin.validation_ds, tokenizer, context_length) if spin.validation_ds else None
    memory = estimate(architecture, spin, train.longest, context_length, len(train))
    check_fits(memory, spin)
    _check_loggers(cfg.exp_manager)
    return Inputs(spin, run_dir, resume_from, context_length, train, validation, memory)


def _load(cfg: DatasetConfig, tokenizer: TextTokenizer, context_length: int) -> SFTDataset:
    return load_dataset(
        cfg.file_path,
        tokenizer,
        max_seq_length=min(cfg.max_seq_length or context_length, context_length),
        prompt_template=cfg.prompt_template,
        label_key=cfg.label_key,
        add_bos=cfg.add_bos,
        add_eos=cfg.add_eos,
        chat_prompt_tokens=cfg.chat_prompt_tokens,
        overlong=cfg.overlong,
        truncation_field=cfg.truncation_field,
        truncation_method=cfg.truncation_method,
        on_bad_record=cfg.on_bad_record,
        weights=cfg.weights,
        cache_dir=cfg.cache_dir,
    )


def train(cfg: DictConfig) -> Path | None:
    """Run self-play training in this process, one of those that were started for it; begins with `preflight`.

    Returns the path of the resulting `.nemo`, or None if none was asked for.
    """
    inputs = preflight(cfg)
    spin = inputs.cfg
    time_limit = TimeLimit(spin.loop.max_seconds)
    log = _start_experiment(cfg, inputs.run_dir)
    parallel = spin.parallel
    setup.initialize(parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, spin.seed)
    try:
        reporter = Reporter(_is_main(), log)
        reporter.say(f"Layout: {parallel}; {inputs.memory}")
        for dataset in filter(None, (inputs.train_dataset, inputs.validation_dataset)):
            for report in dataset.reports:
                reporter.say(str(report))
        with open_dict(cfg):
            cfg.model.precision = spin.precision
        model = MegatronGPTSPINModel.restore_from(spin.restore_from_path, override_config_path=cfg.model)
        model.prepare_training(spin, inputs.context_length, inputs.train_dataset.stop_ids)
        trainer = SPINTrainer(
            spin, model, inputs.train_dataset, inputs.validation_dataset, inputs.run_dir, reporter, time_limit
        )
        if inputs.resume_from is not None:
            trainer.resume(inputs.resume_from)
            reporter.say(f"Resumed from {inputs.resume_from}")
        finished = trainer.fit()
        if not finished:
            reporter.say(
                f"exp_manager.max_time_per_run is up: saved after step {trainer.progress.step}. The same command, with "
                "exp_manager.resume_if_exists=true, goes on from there."
            )
        return _save_result(cfg, inputs, model, trainer, reporter) if finished else None
    finally:
        setup.shutdown()


def _save_result(
    cfg: DictConfig, inputs: Inputs, model: MegatronGPTSPINModel, trainer: SPINTrainer, reporter: Reporter
) -> Path | None:
    if best := trainer.checkpoints.best():
        checkpoint, value = best
        reporter.say(f"Best {inputs.cfg.checkpoint.monitor}: {value:.4f}, {checkpoint}")
    if not inputs.cfg.checkpoint.save_nemo_on_train_end:
        return None
    path = inputs.run_dir / "checkpoints" / f"{cfg.exp_manager.get('name') or 'megatron_gpt_spin'}.nemo"
    model.save_to(path)
    reporter.say(f"Saved {path}")
    return path


def _is_main() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _run_dir(cfg: DictConfig) -> Path:
    """Where the run writes, as NeMo's exp_manager lays it out for a run that can be resumed."""
    exp = cfg.exp_manager
    if exp.get("explicit_log_dir"):
        return Path(exp.explicit_log_dir).expanduser().resolve()
    return (Path(exp.get("exp_dir") or "nemo_experiments").expanduser() / (exp.get("name") or "default")).resolve()


def _checkpoint_to_resume(cfg: DictConfig, run_dir: Path) -> Path | None:
    exp = cfg.exp_manager
    latest = TrainingCheckpoints(run_dir / "checkpoints").latest()
    if exp.get("resume_if_exists"):
        if latest is None and not exp.get("resume_ignore_no_checkpoint"):
            raise ConfigError(
                f"exp_manager.resume_if_exists is set, but {run_dir} holds no checkpoint: choose the directory of the "
                "run, or set exp_manager.resume_ignore_no_checkpoint=true to start one."
            )
        return latest
    if latest is not None:
        raise ConfigError(
            f"{run_dir} holds the checkpoints of an earlier run: set exp_manager.resume_if_exists=true to go on with "
            "it, or choose another exp_manager.explicit_log_dir."
        )
    return None


def _check_loggers(exp: DictConfig) -> None:
    """Refuse a logger that is not installed, before anything is started for it."""
    for name in LOGGERS:
        if exp.get(f"create_{name}_logger") and not any(map(find_spec, _PACKAGES[name])):
            raise ConfigError(
                f"exp_manager.create_{name}_logger is true, but {name} is not installed: pip install {name}, or set it "
                "to false."
            )


def _start_experiment(cfg: DictConfig, run_dir: Path) -> MetricsLog | None:
    """NeMo's exp_manager on the main process: loggers and the record of the command. Returns where metrics go."""
    if not _is_main():
        return None
    from lightning.pytorch import Trainer
    from nemo.utils import logging as nemo_logging
    from nemo.utils.exp_manager import exp_manager

    # Both begin by printing what they found and every option that they know, in a page.
    nemo_logging.setLevel(nemo_logging.WARNING)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)

    options = OmegaConf.to_container(cfg.exp_manager, resolve=True)
    options = {key: value for key, value in options.items() if key not in _OURS}
    options |= {"explicit_log_dir": str(run_dir), "exp_dir": None, "create_checkpoint_callback": False}
    if options.get("create_mlflow_logger"):
        kwargs = {key: value for key, value in (options["mlflow_logger_kwargs"] or {}).items() if value is not None}
        tracking_uri = os.environ.get("MLFLOW_TRACKING_URI", f"file:{run_dir / 'mlruns'}")
        options["mlflow_logger_kwargs"] = {"tracking_uri": tracking_uri} | kwargs
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, barebones=False)
    exp_manager(trainer, OmegaConf.create(options))
    # exp_manager shows megatron-core's log on the terminal: a page of settings and buckets for every model it wraps.
    logging.getLogger("megatron.core").setLevel(logging.WARNING)
    OmegaConf.save(cfg, run_dir / "config.yaml", resolve=True)
    return MetricsLog(run_dir / FILE_NAME, trainer.loggers)
