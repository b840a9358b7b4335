"""A SPIN run in this process: the package's trainer, its shipped configuration, and figures as it goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starting_models import let_go_of

import nemo_spin.cli.silence_libraries  # noqa: F401
from nemo_spin.config import SpinConfig, config_dir, parse_config
from nemo_spin.data.dataset import load_dataset
from nemo_spin.model import MegatronGPTSPINModel
from nemo_spin.reporting.console import Reporter
from nemo_spin.runtime.stopping import Stopping
from nemo_spin.trainer import SPINTrainer

if TYPE_CHECKING:
    from nemo_spin.runtime.progress import Progress


class Watcher(Reporter):
    """Looks at the policy at the end of each iteration, and adds up where the time went.

    In what is logged, `.../late` are means over the second half of the iteration's steps.
    after_iteration: told the number of the iteration, the steps so far, and what the iteration logged at its start
    (`equilibrium/*`, of the policy before it) and at its end.
    reason: why the run ended before its last iteration; empty if it did not.
    """

    def __init__(self, after_iteration: Callable[[int, int, dict[str, float]], None]) -> None:
        super().__init__(is_main=False)
        self.after_iteration = after_iteration
        self.seconds = {"rollouts": 0.0, "training steps": 0.0}
        self.logged: dict[int, dict[str, float]] = {}
        self._steps_logged: list[dict[str, float]] = []
        self._at_start: dict[str, float] = {}
        self.reason = ""

    def log(self, kind: str, progress: Progress, metrics: dict[str, float], **position: Any) -> None:
        if kind == "rollout":
            self.seconds["rollouts"] += metrics.get("time/rollout", 0.0)
        if kind == "equilibrium":
            self._at_start = dict(metrics)
        if kind == "train":
            self.seconds["training steps"] += metrics["time/train_step"]
            self._steps_logged.append(metrics)
        if kind == "iteration":
            late = self._steps_logged[len(self._steps_logged) // 2 :]
            self.logged[progress.iteration] = (
                self._at_start
                | dict(metrics)
                | {
                    f"{name}/late": sum(step[name] for step in late) / len(late)
                    for name in ("loss", "rewards/accuracies", "kl")
                }
            )
            self._steps_logged = []
            self.after_iteration(progress.iteration, progress.step, self.logged[progress.iteration])

    def end(self, progress: Progress, reason: str) -> None:
        self.reason = reason
        super().end(progress, reason)


class Player(SPINTrainer):
    """SPIN without checkpoints: a run of the study is short, and is done again when it was interrupted."""

    def save(self, metrics: dict[str, float]) -> None:
        pass


def configuration(overrides: Sequence[str]) -> tuple[SpinConfig, Any]:
    """conf/gpt_spin_tiny.yaml with overrides, checked; and as hydra has it."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(config_dir()), version_base=None):
        composed = compose("gpt_spin_tiny", overrides=list(overrides))
    return parse_config(OmegaConf.to_container(composed, resolve=True)), composed


def play(
    start: Path,
    overrides: Sequence[str],
    directory: Path,
    context: int,
    cache: Path,
    look: Callable[[MegatronGPTSPINModel, int, int, dict[str, float]], None],
) -> dict[str, float]:
    """Run SPIN from a `.nemo`. Returns the seconds that rollouts and steps took.

    overrides: of conf/gpt_spin_tiny.yaml, the data among them. directory: for the run's rollouts.
    look: called at the end of each iteration, before the policy becomes the reference, with the policy, the number of
    the iteration, the steps so far and what was logged.
    """
    cfg, composed = configuration(
        [*overrides, f"pretrained_checkpoint.restore_from_path={start}", f"exp_manager.explicit_log_dir={directory}"]
    )
    model = MegatronGPTSPINModel.restore_from(str(start), override_config_path=composed.model)
    data = _load(cfg.train_ds, model, context, cache)
    held_out = None if cfg.validation_ds is None else _load(cfg.validation_ds, model, context, cache)
    policy = model.policy(cfg, context_length=context, stop_ids=data.stop_ids)
    directory.mkdir(parents=True)
    looking = 0.0

    def after_iteration(iteration: int, step: int, logged: dict[str, float]) -> None:
        nonlocal looking
        started = time.perf_counter()
        look(model, iteration, step, logged)
        looking += time.perf_counter() - started

    watcher = Watcher(after_iteration)
    trainer = Player(cfg, policy, data, held_out, directory, watcher, Stopping())
    trainer.fit()
    let_go_of(policy.optimizer)
    return watcher.seconds | {"measuring": looking}


def _load(section: Any, model: MegatronGPTSPINModel, context: int, cache: Path) -> Any:
    return load_dataset(replace(section, cache_dir=str(cache)), model.tokenizer, section.max_seq_length or context)
