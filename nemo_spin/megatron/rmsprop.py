"""RMSProp, the paper's optimizer, inside megatron-core's wrappers: those know Adam and SGD only.

They are built around SGD, which asks nothing of its state, and RMSProp takes its place over the same parameters: in
bf16 the fp32 copies that the wrapper has made by then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer

if TYPE_CHECKING:
    from nemo_spin.config import OptimConfig


def rmsprop(model: DistributedDataParallel, optim: OptimConfig, **settings: Any) -> MegatronOptimizer:
    """torch's RMSprop as megatron-core's optimizers are, its state not sharded. settings: of megatron-core's config."""
    wrapper = get_megatron_optimizer(OptimizerConfig(optimizer="sgd", **settings), [model])
    for part in getattr(wrapper, "chained_optimizers", [wrapper]):
        sgd = part.optimizer
        own = sgd.defaults.keys() - {"lr", "weight_decay"}  # its momentum would become RMSProp's
        groups = [{key: value for key, value in group.items() if key not in own} for group in sgd.param_groups]
        part.optimizer = torch.optim.RMSprop(groups, lr=optim.lr[0], alpha=optim.alpha, eps=optim.eps)
        part.init_state_fn = _make_state
    return wrapper


def _make_state(optimizer: torch.optim.Optimizer, config: OptimizerConfig | None = None) -> None:
    """megatron-core calls it before a checkpoint is read, for places to read it into; it keeps the step apart."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not optimizer.state[parameter]:
                optimizer.state[parameter]["square_avg"] = torch.zeros_like(parameter.data)
