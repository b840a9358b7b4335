"""A training run from its configuration: check everything, then build, train, and write the result."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf

from nemo_spin.commands import experiment
from nemo_spin.commands.best_iteration import settle_on_best
from nemo_spin.commands.memory_estimate import MemoryEstimate, check_fits, estimate
from nemo_spin.config import DatasetConfig, SpinConfig, notices, parse_config, resolved, with_checkpoint
from nemo_spin.data.dataset import SFTDataset, load_dataset
from nemo_spin.data.tokenizer import TextTokenizer
from nemo_spin.errors import ConfigError, UserError
from nemo_spin.generation.choose import check_engine
from nemo_spin.megatron import setup
from nemo_spin.megatron.architecture import check_layout
from nemo_spin.megatron.gpt import DTYPES
from nemo_spin.model import MegatronGPTSPINModel
from nemo_spin.model_io.export import check_expressible, export
from nemo_spin.model_io.open import open_checkpoint
from nemo_spin.model_io.tokenizers import check_tokenizer_fits, restore_tokenizer
from nemo_spin.reporting.console import Reporter
from nemo_spin.reporting.metrics_log import MetricsLog
from nemo_spin.reporting.page import write_report
from nemo_spin.runtime import run_lock
from nemo_spin.runtime.collectives import is_main, of_first
from nemo_spin.runtime.kill_points import reached
from nemo_spin.runtime.stopping import Stopping
from nemo_spin.runtime.watchdog import Watchdog, beat, communication_timeout
from nemo_spin.trainer import SPINTrainer

# To say what went wrong, and for loggers to send what they have.
_SECONDS_TO_LEAVE = 60


@dataclass(frozen=True)
class Inputs:
    """Everything a run needs before its weights: checked, and nothing written yet.

    raw: the configuration as it is written down, complete with what the checkpoint says.
    checkpoint: the SFT model; chosen says so where it is one of several. run_dir: where the run writes. context_length:
    most tokens of prompt and response. memory: what each device will hold.
    """

    cfg: SpinConfig
    raw: DictConfig
    checkpoint: Path
    chosen: str | None
    run_dir: Path
    context_length: int
    train_dataset: SFTDataset
    validation_dataset: SFTDataset | None
    memory: MemoryEstimate


def preflight(raw: DictConfig) -> Inputs:
    """Read configuration, the checkpoint's description and the data; load no weights, write nothing.

    Raises UserError for the first thing that cannot be used.
    """
    given = parse_config(raw)
    run_dir = experiment.run_dir(given.experiment)
    experiment.checkpoint_to_resume(given.experiment, run_dir)  # refused before anything is loaded
    with open_checkpoint(given.restore_from_path) as source:
        tokenizer = restore_tokenizer(source, given.tokenizer and dataclasses.asdict(given.tokenizer))
        architecture = source.architecture(tokenizer.vocab_size)
    check_tokenizer_fits(tokenizer, architecture.vocab_rows, str(source.path))
    context_length = given.encoder_seq_length or architecture.max_sequence_length
    cfg, raw = with_checkpoint(raw, context_length, source.trained_layout)
    check_layout(
        architecture,
        cfg.parallel.tensor_model_parallel_size,
        cfg.parallel.pipeline_model_parallel_size,
        cfg.parallel.sequence_parallel,
    )
    check_engine(cfg.spin.generation_engine, architecture, cfg.precision)
    if architecture.position_embedding_type == "learned_absolute" and context_length > architecture.max_sequence_length:
        raise ConfigError(
            f"model.encoder_seq_length {context_length} is more than the {architecture.max_sequence_length} positions "
            "that the checkpoint has learned: choose at most that."
        )
    train = _load(cfg.train_ds, tokenizer, context_length)
    validation = _load(cfg.validation_ds, tokenizer, context_length) if cfg.validation_ds else None
    if cfg.spin.first_rollouts_from_data and train.num_given_rejected < len(train):
        raise ConfigError(
            f"model.spin.first_rollouts_from_data is true, but {len(train) - train.num_given_rejected} of {len(train)} "
            'examples of model.data.train_ds have no generated response: use {"real", "generated"} records, or set it '
            "to false."
        )
    for file_format in cfg.checkpoint.formats_on_train_end:
        check_expressible(architecture, DTYPES[cfg.precision], file_format)
    memory = estimate(architecture, cfg, train.longest, context_length, len(train))
    check_fits(memory, cfg)
    experiment.check_loggers(cfg.experiment)
    return Inputs(cfg, raw, source.path, source.chosen, run_dir, context_length, train, validation, memory)


def _load(cfg: DatasetConfig, tokenizer: TextTokenizer, context_length: int) -> SFTDataset:
    return load_dataset(cfg, tokenizer, min(cfg.max_seq_length or context_length, context_length))


def train(raw: DictConfig) -> list[Path]:
    """Run self-play training in this process, one of those that were started for it; begins with `preflight`.

    Returns the paths of the checkpoints that were asked for at its end.
    """
    notes = notices(resolved(raw))
    inputs = preflight(raw)
    cfg = inputs.cfg
    stopping = Stopping(cfg.loop.max_seconds)
    reporter = Reporter(is_main())
    with run_lock.held(inputs.run_dir, reporter.say) if is_main() else nullcontext():
        log = experiment.start(cfg.experiment, inputs.raw, inputs.run_dir) if is_main() else None
        parallel, timeout = cfg.parallel, communication_timeout(cfg.loop.hang_timeout)
        succeeded = False
        try:
            setup.initialize(
                parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, cfg.seed, timeout
            )
            with Watchdog(cfg.loop.hang_timeout, setup.store(), dist.get_rank(), dist.get_world_size()):
                saved = _train(inputs, Reporter(is_main(), log), notes, stopping)
            succeeded = True
            return saved
        finally:
            _leave(succeeded, log)


def _train(inputs: Inputs, reporter: Reporter, notes: Sequence[str], stopping: Stopping) -> list[Path]:
    cfg = inputs.cfg
    for note in notes:
        reporter.say(f"note: {note}")
    if inputs.chosen:
        reporter.say(f"{cfg.restore_from_path}: {inputs.chosen}")
    reporter.say(f"Layout: {cfg.parallel}; {inputs.memory}")
    for dataset in filter(None, (inputs.train_dataset, inputs.validation_dataset)):
        for report in dataset.reports:
            reporter.say(str(report))
    beat("loading the model")
    options = {**OmegaConf.to_container(inputs.raw.model, resolve=True), "precision": cfg.precision}
    model = MegatronGPTSPINModel.restore_from(str(inputs.checkpoint), override_config_path=OmegaConf.create(options))
    policy = model.policy(cfg, inputs.context_length, inputs.train_dataset.stop_ids)
    trainer = SPINTrainer(
        cfg, policy, inputs.train_dataset, inputs.validation_dataset, inputs.run_dir, reporter, stopping
    )
    # Looked up now that no other run writes there, and once: a file system may show machines different things.
    if resume_from := of_first(lambda: experiment.checkpoint_to_resume(cfg.experiment, inputs.run_dir)):
        beat("loading the checkpoint to resume from")
        reporter.say(f"Resumed from {trainer.resume(resume_from)}")
    reached("run/started")
    with stopping.signals(setup.store()):
        finished = trainer.fit()
    saved: list[Path] = []
    if stopping.asked:
        left = "goes on from there" if not finished else "writes the result"
        reporter.say(
            f"{stopping.reason}: saved after step {trainer.progress.step}. The same command, with "
            f"exp_manager.resume_if_exists=true, {left}."
        )
    else:
        reached("run/trained")
        saved = _save_results(inputs, model, trainer, reporter)
    _write_report(inputs.run_dir, reporter)
    return saved


def _leave(succeeded: bool, log: MetricsLog | None) -> None:
    """End what the run has begun. After a failure a process of several ends within a time, whatever hangs."""
    several = "RANK" in os.environ
    if several and not succeeded:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(_SECONDS_TO_LEAVE)
    if log is not None:
        log.finish(succeeded)
    # Leaving the process groups may wait for processes that are gone.
    if succeeded or not several:
        setup.shutdown()


def _save_results(inputs: Inputs, model: MegatronGPTSPINModel, trainer: SPINTrainer, reporter: Reporter) -> list[Path]:
    settle_on_best(inputs.cfg.checkpoint, model, trainer)
    name = inputs.cfg.experiment.name
    saved = []
    for file_format in inputs.cfg.checkpoint.formats_on_train_end:
        beat(f"writing the result as {file_format}")
        path = inputs.run_dir / "checkpoints" / (f"{name}.nemo" if file_format == "nemo" else f"{name}-{file_format}")
        for note in export(model.content(), path, file_format):
            reporter.say(f"note: {path.name}: {note}")
        reporter.say(f"Saved {path}")
        saved.append(path)
    return saved


def _write_report(run_dir: Path, reporter: Reporter) -> None:
    """The page for people; whatever is wrong with it, the run is not."""
    if is_main():
        try:
            reporter.say(f"Report: {write_report(run_dir)}")
        except UserError as error:
            reporter.say(f"No report was written: {error}")
