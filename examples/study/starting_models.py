"""Supervised fine-tuning: the model that all runs of a (task, seed, size) start from, and the control that goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tasks import SFT, Shape, Task

if TYPE_CHECKING:
    from nemo_spin import MegatronGPTSPINModel
    from nemo_spin.data.dataset import SFTDataset
    from nemo_spin.megatron.optimizer import Optimizer


def new_model(task: Task, data: Path, shape: Shape, seed: int) -> MegatronGPTSPINModel:
    """With weights of its own for each seed, also where a process has made other models before."""
    from megatron.core import tensor_parallel
    from omegaconf import OmegaConf

    from nemo_spin import MegatronGPTSPINModel
    from nemo_spin.megatron import setup

    if not setup.is_initialized():
        setup.initialize(1, 1, seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return MegatronGPTSPINModel(OmegaConf.create(task.model_config(data, shape, seed)))


def make_starting_model(task: Task, data: Path, shape: Shape, seed: int, output: Path) -> MegatronGPTSPINModel:
    """SFT from random weights; written to `output` as a `.nemo`."""
    model = new_model(task, data, shape, seed)
    learned = read(task, model, data, data / "sft.jsonl")
    tuning = FineTuning(model, learned, task.sft, seed)
    tuning.run(task.sft.steps, task.sft.lr)
    let_go_of(tuning.optimizer)
    model.save_to(output)
    return model


def train_on(
    task: Task,
    model: MegatronGPTSPINModel,
    dataset: SFTDataset,
    rounds: Sequence[int],
    lr: float,
    seed: int,
    after_round: Callable[[int, int], None],
) -> None:
    """Further SFT in rounds of so many steps, each with a fresh optimizer and schedule, as SPIN's iterations have them.

    after_round: told the number of the round and the steps so far.
    """
    tuning = FineTuning(model, dataset, replace(task.sft, batch_size=task.batch_size, weight_decay=0.01), seed)
    done = 0
    for number, steps in enumerate(rounds):
        tuning.run(steps, lr)
        done += steps
        after_round(number, done)
    let_go_of(tuning.optimizer)


def let_go_of(optimizer: Optimizer) -> None:
    """megatron-core hangs hooks that know the model on autograd's nodes, a circle that Python's collector does not see:
    without this a process that makes a hundred runs keeps a hundred models."""
    import gc
    import types

    for referrer in gc.get_referrers(optimizer.model):
        if isinstance(referrer, types.CellType):
            referrer.cell_contents = None
    gc.collect()


def read(task: Task, model: MegatronGPTSPINModel, data: Path, file: Path) -> SFTDataset:
    from nemo_spin.config import DatasetConfig
    from nemo_spin.data.dataset import load_dataset

    cfg = DatasetConfig((str(file),), prompt_template=task.template, cache_dir=str(data / "cache"))
    return load_dataset(cfg, model.tokenizer, task.context)


class FineTuning:
    """SFT steps on a model: one of these for each model, which is wrapped for training once."""

    def __init__(self, model: MegatronGPTSPINModel, dataset: SFTDataset, settings: SFT, seed: int) -> None:
        from nemo_spin.config import OptimConfig, SchedConfig
        from nemo_spin.megatron.optimizer import Optimizer

        self.model, self.dataset, self.settings, self.seed = model, dataset, settings, seed
        sched = SchedConfig("CosineAnnealing", settings.warmup_steps, constant_steps=0, min_lr=0.0)
        optim = OptimConfig("adam", (settings.lr,), settings.weight_decay, betas=(0.9, 0.98), eps=1e-8, sched=sched)
        self.optimizer = Optimizer(model.gpt, optim, gradient_clip_val=1.0)
        self.epoch = 0

    def run(self, steps: int, lr: float) -> None:
        """So many steps with a schedule of their own, over as many epochs as they take."""
        from nemo_spin.data.order import batches, epoch_order, num_batches
        from nemo_spin.megatron.steps import sft_step
        from nemo_spin.selfplay.pairs import group_of_example

        self.optimizer.start(lr, total_steps=steps)
        size = self.settings.batch_size
        while steps:
            order = epoch_order(len(self.dataset), self.seed, 0, self.epoch, shuffle=True)
            now = min(steps, num_batches(len(self.dataset), size))
            for batch in batches(self.dataset, order, size, limit_batches=now):
                sft_step(self.optimizer, [group_of_example(e) for e in batch], self.model.batching(size))
            steps -= now
            self.epoch += 1
