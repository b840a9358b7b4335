"""The directory of a run, what it is resumed from, and its loggers, as NeMo's exp_manager lays them out."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_spin.checkpoint.manager import TrainingCheckpoints
from nemo_spin.config import LOGGERS, ExperimentConfig
from nemo_spin.errors import ConfigError
from nemo_spin.reporting.metrics_log import FILE_NAME, MetricsLog
from nemo_spin.runtime.run_lock import was_begun_by_this_launch

# logger -> the packages of which one has to be there
_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "mlflow": ("mlflow",)}


def run_dir(exp: ExperimentConfig) -> Path:
    """Where the run writes, as NeMo's exp_manager lays it out for a run that can be resumed."""
    if exp.explicit_log_dir:
        return Path(exp.explicit_log_dir).expanduser().resolve()
    return (Path(exp.exp_dir or "nemo_experiments").expanduser() / exp.name).resolve()


def checkpoint_to_resume(exp: ExperimentConfig, run_dir: Path) -> Path | None:
    """The newest checkpoint where the run is to go on from it; None to start anew. Raises ConfigError."""
    started_again = was_begun_by_this_launch(run_dir)
    latest = TrainingCheckpoints(run_dir / "checkpoints").latest()
    if exp.resume_if_exists or started_again:
        if latest is None and not (exp.resume_ignore_no_checkpoint or started_again):
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


def check_loggers(exp: ExperimentConfig) -> None:
    """Refuse a logger that is not installed, before anything is started for it."""
    for name in LOGGERS:
        if getattr(exp, f"create_{name}_logger") and not any(map(find_spec, _PACKAGES[name])):
            raise ConfigError(
                f"exp_manager.create_{name}_logger is true, but {name} is not installed: pip install {name}, or set it "
                "to false."
            )


def start(exp: ExperimentConfig, raw: DictConfig, run_dir: Path) -> MetricsLog:
    """Call NeMo's exp_manager, on the main process: loggers and the record of the command. Returns where metrics go.

    raw: the whole configuration, which is written down.
    """
    from lightning.pytorch import Trainer
    from nemo.utils import exp_manager as nemo_exp_manager
    from nemo.utils import logging as nemo_logging

    # Both begin by printing what they found and every option that they know, in a page.
    nemo_logging.setLevel(nemo_logging.WARNING)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)

    # Resuming, checkpoints and time are this package's own: exp_manager knows one file per checkpoint, not shards.
    options = {
        "explicit_log_dir": str(run_dir),
        "name": exp.name,
        "create_checkpoint_callback": False,
        "create_tensorboard_logger": exp.create_tensorboard_logger,
        "summary_writer_kwargs": exp.summary_writer_kwargs,
        "create_wandb_logger": exp.create_wandb_logger,
        "wandb_logger_kwargs": exp.wandb_logger_kwargs,
        "files_to_copy": list(exp.files_to_copy) or None,
    }
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, barebones=False)
    # It moves all files of an earlier start into run_0, run_1, ..., and the metrics of a run are in one file.
    check_resume, nemo_exp_manager.check_resume = nemo_exp_manager.check_resume, lambda *args: None
    try:
        nemo_exp_manager.exp_manager(trainer, OmegaConf.create(options))
    finally:
        nemo_exp_manager.check_resume = check_resume
    # exp_manager shows megatron-core's log on the terminal: a page of settings and buckets for every model it wraps.
    logging.getLogger("megatron.core").setLevel(logging.WARNING)
    OmegaConf.save(raw, run_dir / "config.yaml", resolve=True)
    loggers = list(trainer.loggers)
    if exp.create_mlflow_logger:
        loggers.append(_mlflow_logger(exp.mlflow_logger_kwargs or {}, exp.name, run_dir))
    return MetricsLog(run_dir / FILE_NAME, loggers)


def _mlflow_logger(kwargs: Mapping[str, Any], name: str, run_dir: Path) -> Any:
    """Made here, because exp_manager gives `run_name` twice (NeMo 3.0.0) and so cannot."""
    from lightning.pytorch.loggers import MLFlowLogger

    given = {"run_name": name, "save_dir": None} | {key: value for key, value in kwargs.items() if value is not None}
    if "tracking_uri" not in given and "MLFLOW_TRACKING_URI" not in os.environ:
        given |= {"tracking_uri": f"sqlite:///{run_dir}/mlflow.db", "artifact_location": f"{run_dir}/mlflow"}
    return MLFlowLogger(**given)
