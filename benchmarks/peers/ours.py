"""This project's side: answers the commands of compare.py in the environment that has nemo_spin.

Everything goes the way that a run goes: the model of `restore_from`, its `generator`, `roll_out` and `train_step`,
and for a whole iteration the trainer, from the files on disk to the checkpoint at its end.
"""

from __future__ import annotations

import gc
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import nemo_spin.cli.silence_libraries  # noqa: F401, I001

import torch
import workloads
from omegaconf import DictConfig, OmegaConf
from peak import above_idle
from protocol import Answer, serve
from settings import BETA, BETAS, CLIP, EPS, LEARNING_RATE, PAIRS_PER_STEP, SEED, WEIGHT_DECAY
from workloads import WORKLOADS, Workload

from nemo_spin.commands import train
from nemo_spin.config import config_dir, parse_config, register_resolvers
from nemo_spin.generation.engine import Generator
from nemo_spin.generation.interface import GenerationRequest
from nemo_spin.megatron import setup
from nemo_spin.model import MegatronGPTSPINModel
from nemo_spin.selfplay.megatron_policy import MegatronPolicy
from nemo_spin.selfplay.pairs import Pair, Rollout
from nemo_spin.data.example import Example
from nemo_spin.reporting.console import Reporter
from nemo_spin.selfplay.rollouts.roll_out import RolloutRequest
from nemo_spin.trainer import SPINTrainer

_MODEL = Path(sys.argv[1])
_THREADS = int(sys.argv[2])
_SLOTS = 128
_PAIRS_SCORED_TOGETHER = 32
"""Without gradients, and without padding, more at a time is faster. TRL pads: its default, 8 here, is its best."""


def configuration(workload: Workload, data: Path, directory: Path, slots: int = _SLOTS) -> DictConfig:
    """Of a run of one iteration that writes to `directory`."""
    own = {
        "trainer": {
            "accelerator": "cpu",
            "precision": 32,
            "spin": {"save_interval": 0, "log_samples": 0, "gradient_clip_val": CLIP},
        },
        "exp_manager": {"explicit_log_dir": str(directory / "run"), "create_tensorboard_logger": False},
        "pretrained_checkpoint": {"restore_from_path": str(_MODEL)},
        "model": {
            "micro_batch_size": PAIRS_PER_STEP,
            "global_batch_size": PAIRS_PER_STEP,
            "encoder_seq_length": workload.context,
            "seed": SEED,
            "spin": {
                "ref_policy_kl_penalty": BETA,
                "rollout_batch_size": slots,
                "log_prob_forward_micro_batch_size": _PAIRS_SCORED_TOGETHER,
                "length_params": {"max_length": workload.max_new_tokens},
            },
            "optim": {
                "name": "adamw",
                "lr": LEARNING_RATE,
                "betas": list(BETAS),
                "eps": EPS,
                "weight_decay": WEIGHT_DECAY,
                "sched": {"name": "Constant", "warmup_steps": 0, "min_lr": LEARNING_RATE},
            },
            "data": {
                "cache_dir": str(directory / "tokenized"),
                "train_ds": {"file_path": str(data / "data.jsonl")},
                "validation_ds": {"file_path": None},
            },
        },
    }
    return OmegaConf.merge(OmegaConf.load(config_dir() / "gpt_spin.yaml"), own)


def load(cfg: DictConfig) -> MegatronGPTSPINModel:
    return MegatronGPTSPINModel.restore_from(str(_MODEL), override_config_path=cfg.model)


def examples(texts: workloads.Texts) -> list[Example]:
    both = zip(texts.prompts, texts.chosen, strict=True)
    return [Example(i, tuple(prompt), tuple(chosen)) for i, (prompt, chosen) in enumerate(both)]


def _scored(policy: MegatronPolicy, given: list[Example], responses: Sequence[Sequence[int]]) -> list[Rollout]:
    """Of one response to each example."""
    both = zip(given, responses, strict=True)
    known = {(example.index, 0): policy.given_response(example.index, ids) for example, ids in both}
    return policy.roll_out(RolloutRequest(given, iteration=0, known=known)).rollouts


class Side:
    """One method for each command. name: of the workload, whose texts lie in the directory `data`."""

    def __init__(self) -> None:
        self._model: MegatronGPTSPINModel | None = None
        self._iterations = itertools.count()

    def generate(self, name: str, data: str, batch: int) -> Answer:
        """Responses to all prompts, at most `batch` at a time. Another random number for each call."""
        workload, texts = WORKLOADS[name], workloads.read(Path(data))
        with tempfile.TemporaryDirectory() as scratch:
            cfg = configuration(workload, Path(data), Path(scratch))
            if self._model is None:
                self._model = load(cfg)
            rules = self._model.generation_rules(
                parse_config(cfg).spin.sampling_params,
                min_length=1,
                stop_ids=frozenset() if workload.equal else frozenset({workloads.EOS_ID}),
                seed=SEED,
                context_length=workload.context,
            )
            generator = Generator(self._model.gpt, rules, slots=batch)
        requests = [GenerationRequest(i, tuple(p), workload.max_new_tokens) for i, p in enumerate(texts.prompts)]
        start = time.perf_counter()
        responses = generator.generate(requests, next(self._iterations))
        seconds = time.perf_counter() - start
        lengths = [len(response.ids) for response in responses]
        return {
            "seconds": seconds,
            "tokens": sum(lengths),
            "useful": generator.statistics.useful_share,
        }

    def logps(self, name: str, data: str) -> Answer:
        """Log-probabilities of the first pairs' answers under the starting model, which is the reference."""
        texts = workloads.read(Path(data))
        some = slice(PAIRS_PER_STEP)
        with tempfile.TemporaryDirectory() as scratch:
            cfg = configuration(WORKLOADS[name], Path(data), Path(scratch))
            model = load(cfg)
            policy = model.policy(parse_config(cfg), WORKLOADS[name].context, frozenset({workloads.EOS_ID}))
        rollouts = _scored(policy, examples(texts)[some], texts.rejected[some])
        return {
            "chosen": [rollout.ref_chosen_logps for rollout in rollouts],
            "rejected": [rollout.ref_rejected_logps for rollout in rollouts],
        }

    def train(self, name: str, data: str, precompute: bool = True, pairs: int | None = None) -> Answer:
        """An epoch on the given pairs. precompute: ours always does, which is `set_up` with the optimizer's making."""
        with tempfile.TemporaryDirectory() as scratch:
            cfg = configuration(WORKLOADS[name], Path(data), Path(scratch))
            return self._train(load(cfg), cfg, name, data, pairs)

    def _train(self, model: MegatronGPTSPINModel, cfg: DictConfig, name: str, data: str, count: int | None) -> Answer:
        texts = workloads.read(Path(data))
        given = examples(texts)[:count]
        start = time.perf_counter()
        policy = model.policy(parse_config(cfg), WORKLOADS[name].context, frozenset({workloads.EOS_ID}))
        rollouts = _scored(policy, given, texts.rejected[:count])
        policy.start_lr_schedule(LEARNING_RATE, len(given) // PAIRS_PER_STEP, 0, fresh=True)
        pairs = [Pair.of(example, rollout) for example, rollout in zip(given, rollouts, strict=True)]
        set_up = time.perf_counter() - start
        losses = [
            policy.train_step(pairs[first : first + PAIRS_PER_STEP], BETA)["loss"]
            for first in range(0, len(pairs), PAIRS_PER_STEP)
        ]
        return {"seconds": time.perf_counter() - start, "set_up": set_up, "first_loss": losses[0]}

    def iteration(self, name: str, data: str, batch: int) -> Answer:
        """What `nemo-spin train` does, from its checks to the checkpoint at the iteration's end, less its imports."""
        with tempfile.TemporaryDirectory() as scratch:
            start = time.perf_counter()
            cfg = configuration(WORKLOADS[name], Path(data), Path(scratch), batch)
            inputs = train.preflight(cfg)
            inputs.run_dir.mkdir(parents=True)
            model = MegatronGPTSPINModel.restore_from(str(inputs.checkpoint), override_config_path=inputs.raw.model)
            policy = model.policy(inputs.cfg, inputs.context_length, inputs.train_dataset.stop_ids)
            loaded = time.perf_counter() - start
            trainer = SPINTrainer(inputs.cfg, policy, inputs.train_dataset, None, inputs.run_dir, Reporter(False))
            finished = trainer.fit()
            seconds = time.perf_counter() - start
            watch = dict(trainer.stopwatch.total)
        if not finished:
            raise RuntimeError("the run was stopped")
        return {"seconds": seconds, "parts": {"load": loaded, **watch}}

    def memory(self, name: str, data: str, precompute: bool = True) -> Answer:
        """Bytes: the peak of training above what the process held with the weights, and the weights."""
        self.train(name, data, pairs=2 * PAIRS_PER_STEP)  # what is made and imported once
        gc.collect()
        with tempfile.TemporaryDirectory() as scratch:
            cfg = configuration(WORKLOADS[name], Path(data), Path(scratch))
            model = load(cfg)
            weights = sum(p.numel() * p.element_size() for p in model.gpt.parameters())
            peak = above_idle(lambda: self._train(model, cfg, name, data, None))
        return {"peak": peak, "weights": weights}


def main() -> None:
    torch.set_num_threads(_THREADS)
    setup.initialize(1, 1, SEED)
    register_resolvers()
    side = Side()
    commands: tuple[Callable[..., Answer], ...] = (side.generate, side.logps, side.train, side.iteration, side.memory)
    serve({command.__name__: command for command in commands})
    setup.shutdown()


if __name__ == "__main__":
    main()
