"""What a run must have in common with the one that it goes on from."""

from __future__ import annotations

from nemo_spin.config import SpinConfig
from nemo_spin.data.dataset import SFTDataset
from nemo_spin.plan import Plan


def identity_of_run(cfg: SpinConfig, dataset: SFTDataset, plan: Plan) -> dict[str, int | str]:
    """What gives counts of steps and rollouts their meaning, by the names that people know.

    An iteration under way can only be resumed with the same.
    """
    return {
        "model.seed": cfg.seed,
        "model.global_batch_size": cfg.global_batch_size,
        "number of training examples": len(dataset),
        "training examples of digest": dataset.digest,
        "model.data.train_ds.weights": str(cfg.train_ds.weights),
        "steps of an iteration": plan.steps_per_iteration,
        "model.spin.sampling_params": str(cfg.spin.sampling_params),
        "model.spin.length_params": str(cfg.spin.length_params),
    }
