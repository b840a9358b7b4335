"""Self-play fine-tuning of a Megatron GPT that NeMo has fine-tuned (SFT).

    python examples/train_gpt_spin.py \
        trainer.devices=4 model.tensor_model_parallel_size=2 model.pipeline_model_parallel_size=2 \
        pretrained_checkpoint.restore_from_path=/models/sft.nemo \
        model.data.train_ds.file_path=/data/train.jsonl \
        model.data.validation_ds.file_path=/data/validation.jsonl \
        exp_manager.explicit_log_dir=/results/spin

It starts its own processes when none were started for it, and runs as well under torchrun and srun.
All keys are explained in conf/gpt_spin.yaml. `nemo-spin train` is the same command.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import nemo_spin.cli.silence_libraries  # noqa: F401
from nemo_spin.cli.train import run_hydra, run_training

if TYPE_CHECKING:
    from omegaconf import DictConfig


def main(cfg: DictConfig) -> None:
    run_training(cfg)


if __name__ == "__main__":
    # Not at the top: NeMo takes seconds to import, and megatron-core's checkpoint writers import this file again.
    from nemo.core.config import hydra_runner

    sys.exit(run_hydra(hydra_runner(config_path="../conf", config_name="gpt_spin")(main), sys.argv))
