"""What a run must have in common with the one that it goes on from."""

from __future__ import annotations

from dataclasses import replace

from nemo_spin.config import SpinConfig
from nemo_spin.data.dataset import SFTDataset
from nemo_spin.selfplay.plan import Plan


def identity_of_run(cfg: SpinConfig, dataset: SFTDataset, plan: Plan, iteration: int) -> dict[str, int | str]:
    """What gives the counts of steps and rollouts of an iteration their meaning, by the names that people know.

    An iteration under way can only be resumed with the same.
    """
    # Where the run has ended, at the end of its last iteration, another one may follow.
    iteration = min(iteration, cfg.loop.max_iterations - 1)
    sampling = replace(cfg.spin.sampling_params, temperature=cfg.spin.temperature[iteration])
    return {
        "model.seed": cfg.seed,
        "model.global_batch_size": cfg.global_batch_size,
        "number of training examples": len(dataset),
        "training examples of digest": dataset.digest,
        "model.data.train_ds.weights": str(cfg.train_ds.weights),
        "steps of an iteration": plan.steps_per_iteration(iteration),
        "model.spin.sampling_params": str(sampling),
        "model.spin.length_params": str(cfg.spin.length_params),
        "model.spin.num_generations": cfg.spin.num_generations,
        "model.spin.rejected_selection": cfg.spin.rejected_selection,
        "model.spin.replay_weights": str(cfg.spin.replay_weights[:iteration]),
    }
