"""Small training runs through the trainer, on a model with a tokenizer that is made on the spot."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from selfplay import SelfPlay, examples, whole_weights
from toy import fill_deterministically

from nemo_spin.config import DatasetConfig, config_dir, parse_config
from nemo_spin.data.dataset import load_dataset
from nemo_spin.model import MegatronGPTSPINModel
from nemo_spin.reporting.console import Reporter
from nemo_spin.reporting.metrics_log import FILE_NAME, MetricsLog
from nemo_spin.runtime.stopping import Stopping
from nemo_spin.trainer import SPINTrainer


def make_tokenizer(path: Path) -> Path:
    """A sentencepiece model of 28 pieces; 0, 1 and 2 are unknown, begin and end."""
    import sentencepiece

    text = path.with_suffix(".txt")
    text.write_text("\n".join(f"{a} plus {b} makes {a + b} in all" for a in range(20) for b in range(20)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(path.with_suffix("")), vocab_size=60, minloglevel=2, hard_vocab_limit=False
    )
    return path.with_suffix(".model")


def make_checkpoint(directory: str, hidden_size: int = 32, num_layers: int = 4) -> str:
    """A `.nemo` with deterministic random weights, written by this process group."""
    config = {
        "mcore_gpt": True,
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "ffn_hidden_size": 64,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "encoder_seq_length": 64,
        "max_position_embeddings": 64,
        "normalization": "rmsnorm",
        "activation": "fast-swiglu",
        "bias": False,
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": False,
        "make_vocab_size_divisible_by": 8,
        "precision": "32",
        "tokenizer": {
            "library": "sentencepiece",
            "model": str(make_tokenizer(Path(directory) / "tokenizer")),
            "sentencepiece_legacy": False,
        },
    }
    model = MegatronGPTSPINModel(OmegaConf.create(config))
    fill_deterministically(model.gpt)
    path = Path(directory) / "sft.nemo"
    model.save_to(path)
    return str(path)


def make_data(directory: str, count: int = 24) -> str:
    path = Path(directory) / "train.jsonl"
    rows = [
        {
            "prompt_ids": [3 + i % 25 for i in e.prompt_ids],
            "response_ids": [*(3 + i % 25 for i in e.response_ids[:-1]), 2],
        }
        for e in examples(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


class InterruptedRunError(Exception):
    """Stands for the end of the process at some step."""


class InterruptingReporter(Reporter):
    """Keeps every step's metrics, and stops the run after a number of steps."""

    def __init__(self, after: int | None, log: MetricsLog | None) -> None:
        super().__init__(is_main=False, log=log)
        self.after = after
        self.history: list[dict[str, Any]] = []

    def step(self, progress: Any, epoch: int, metrics: dict[str, float], *args: Any) -> None:
        self.log("train", progress, metrics, epoch=epoch)
        self.history.append({"step": progress.step, "epoch": epoch, "loss": metrics.get("loss")})
        if self.after is not None and progress.step == self.after:
            # Where an interval checkpoint is due at this step, it has not been written yet.
            raise InterruptedRunError


class CountedQuestions(Stopping):
    """Says yes when it has been asked so many times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def ask(self) -> bool:
        self.times -= 1
        if self.times <= 0:
            self.reason = "asked often enough"
        return self.asked


def training_run(
    checkpoint: str,
    data: str,
    run_dir: str,
    interrupt_after: int | None = None,
    stop_after: int | None = None,
    resume: bool = False,
    at_end: Callable[..., Any] | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Two iterations of two epochs of three steps; returns the history and this rank's final weights.

    stop_after: how many times the run looks at the clock, after each chunk of rollouts and each step.
    at_end: called with configuration, model and trainer after the run, before the weights are taken.
    """
    values = {
        "pretrained_checkpoint.restore_from_path": checkpoint,
        "model.data.train_ds.file_path": data,
        "exp_manager.explicit_log_dir": run_dir,
        "trainer.accelerator": "cpu",
        "trainer.precision": 32,
        "trainer.devices": torch.distributed.get_world_size(),
        "trainer.spin.max_iterations": 2,
        "trainer.spin.max_epochs": 2,
        "trainer.spin.save_interval": 2,
        "model.micro_batch_size": 2,
        "model.global_batch_size": 8,
        "model.spin.ref_policy_kl_penalty": [0.5, 1.0],
        "model.spin.length_params.max_length": 8,
        # Every epoch has the same steps then; what replay does is in test_replay.py.
        "model.spin.replay_iterations": 0,
        "model.optim.lr": [1e-3, 5e-4],
        "model.optim.sched.warmup_steps": 2,
        "model.optim.sched.min_lr": 1e-5,
    } | overrides
    base = OmegaConf.load(config_dir() / "gpt_spin.yaml")
    for key, value in values.items():
        OmegaConf.update(base, key, value)
    cfg = parse_config(OmegaConf.to_container(base, resolve=True))
    model = MegatronGPTSPINModel.restore_from(checkpoint, override_config_path=base.model)
    dataset = load_dataset(DatasetConfig((str(data),)), model.tokenizer, 64)
    policy = model.policy(cfg, context_length=64, stop_ids=dataset.stop_ids)
    Path(run_dir).mkdir(parents=True, exist_ok=True)
    log = MetricsLog(Path(run_dir) / FILE_NAME) if torch.distributed.get_rank() == 0 else None
    reporter = InterruptingReporter(interrupt_after, log)
    stopping = None if stop_after is None else CountedQuestions(stop_after)
    trainer = SPINTrainer(cfg, policy, dataset, dataset, Path(run_dir), reporter, stopping)
    if resume:
        trainer.resume(trainer.checkpoints.latest())
    finished = False
    with suppress(InterruptedRunError):
        finished = trainer.fit()
    ended = at_end(cfg, model, trainer) if at_end else None
    return {
        "history": reporter.history,
        "shards": shards_of(model),
        "progress": trainer.progress.state_dict(),
        "finished": finished,
        "ended": ended,
    }


def finish(results: list[dict[str, Any]]) -> dict[str, Any]:
    """What the first rank returned, and the weights of all."""
    return {**results[0], "weights": whole_weights([result["shards"] for result in results])}


def shards_of(model: MegatronGPTSPINModel) -> list:
    play = SelfPlay.__new__(SelfPlay)
    play.gpt = model.gpt
    return play.shards()
