"""megatron-core's data parallelism and optimizer around a GPT model: zero_grad, step, fresh start, sharded state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from math import isfinite
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, distrib_optimizer, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch.nn.utils import clip_grads_with_norm_

from nemo_spin.megatron.finite import are_finite
from nemo_spin.megatron.rmsprop import rmsprop
from nemo_spin.runtime.collectives import everywhere

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer

    from nemo_spin.config import OptimConfig

_DECAY_STYLES = {"CosineAnnealing": "cosine", "LinearAnnealing": "linear", "Constant": "constant"}

# Sharded by parameter, not by rank: what any layout wrote, any other reads.
_SHARDING = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}


@dataclass(frozen=True, slots=True)
class StepResult:
    """What an optimizer step came to, the same on every process.

    grad_norm: 2-norm of the gradient before clipping. lr: learning rate of the step. skipped: nothing was updated,
    because the loss or the gradient was not finite.
    """

    grad_norm: float
    lr: float
    skipped: bool

    def metrics(self) -> dict[str, float]:
        return {"grad_norm": self.grad_norm, "lr": self.lr, "skipped": float(self.skipped)}


class Optimizer:
    """Adam or RMSProp over a data-parallel model, with clipping, warm-up and decay.

    Gradients are reduced in fp32. In bf16 the parameters that it updates are fp32 copies, kept over iterations.
    `model` is the wrapped model: forward and backward have to go through it.
    """

    def __init__(self, gpt: GPTModel, optim: OptimConfig, gradient_clip_val: float) -> None:
        self.optim = optim
        config = gpt.config
        self.model = DistributedDataParallel(
            config,
            DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=optim.distributed),
            gpt,
        )
        settings = {
            "lr": optim.lr[0],
            "min_lr": 0.0,
            "weight_decay": optim.weight_decay,
            "bf16": config.bf16,
            "params_dtype": config.params_dtype,
            "clip_grad": gradient_clip_val,
            "use_distributed_optimizer": optim.distributed,
        }
        make = rmsprop if optim.is_rmsprop else _adam
        self._optimizer = make(self.model, optim, **settings)
        for part in self._parts():
            # torch's count the steps of each parameter; others count in the group, which is saved in any case.
            if isinstance(part.optimizer, (torch.optim.Adam, torch.optim.RMSprop)):
                part.optimizer.register_load_state_dict_pre_hook(_without_uncounted_moments)
        self._use_one_kernel_for_adam()
        config.grad_scale_func = self._optimizer.scale_loss
        config.finalize_model_grads_func = finalize_model_grads
        self._scheduler: OptimizerParamScheduler | None = None

    def start(self, lr: float, total_steps: int, steps_done: int = 0, fresh: bool = True) -> None:
        """Begin, or go on with, a schedule of `total_steps` steps that peaks at `lr`.

        fresh: forget the moments, as at the start of an iteration in the paper.
        """
        if fresh:
            self._forget_moments()
        sched = self.optim.sched
        warmup_steps = min(sched.warmup_steps, max(total_steps - 1, 0))
        min_lr = min(sched.min_lr, lr)
        for group in self._optimizer.param_groups:
            group["max_lr"], group["min_lr"] = lr, min_lr
        self._scheduler = OptimizerParamScheduler(
            self._optimizer,
            init_lr=0.0,
            max_lr=lr,
            min_lr=min_lr,
            lr_warmup_steps=warmup_steps,
            lr_decay_steps=max(total_steps - sched.constant_steps, warmup_steps + 1),
            lr_decay_style=_DECAY_STYLES[sched.name],
            start_wd=self.optim.weight_decay,
            end_wd=self.optim.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
            use_checkpoint_opt_param_scheduler=False,
            override_opt_param_scheduler=True,
        )
        # megatron-core warms up from a learning rate of 0, which would waste the first step.
        self._scheduler.step(steps_done + (1 if warmup_steps else 0))

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return max(group["lr"] for group in self._optimizer.param_groups)

    def zero_grad(self) -> None:
        self.model.zero_grad_buffer()
        self._optimizer.zero_grad()

    def step(self, loss: float = 0.0) -> StepResult:
        """Reduce, clip, update and advance the schedule.

        loss: of the global batch. Where it, or the gradient on any process, is NaN or infinite, weights and moments
        stay what they are on all processes alike; only the schedule advances.
        """
        lr = self.lr
        self._optimizer.prepare_grads()
        # A number, or a tensor of shape [] or [1], as the kernels have it that compute it.
        grad_norm = float(self._optimizer.get_grad_norm())
        # The norm alone will not do: it counts parameters that tensor-parallel processes share on one of them only.
        is_sound = isfinite(loss) and isfinite(grad_norm) and are_finite(self._gradients_outside_norm())
        skipped = not everywhere(is_sound)
        if not skipped:
            self._clip(grad_norm)
            self._optimizer.step_with_ready_grads()
        self._scheduler.step(1)
        return StepResult(grad_norm, lr, skipped)

    def _gradients_outside_norm(self) -> Iterator[torch.Tensor]:
        """Those that this process is about to use and another process counts in the norm."""
        for part in self._parts():
            for p in part.get_parameters():
                is_counted = param_is_not_shared(p) and param_is_not_tensor_parallel_duplicate(p)
                if p.grad is not None and not is_counted:
                    yield p.grad

    def _clip(self, grad_norm: float) -> None:
        # torch scales in place; megatron-core's own, without Apex, makes every gradient anew and copies it back.
        for part in self._parts():
            if 0.0 < part.config.clip_grad < grad_norm:
                clip_grads_with_norm_(part.get_parameters(), part.config.clip_grad, torch.tensor(grad_norm))

    def sharded_state_dict(self, model_state: dict[str, Any], is_loading: bool = False) -> dict[str, Any]:
        """Moments, step and fp32 parameters as megatron-core shards them.

        model_state: the model's own sharded state dict; optimizer shards are cut like the parameters in it.
        """
        if is_loading:
            for part in self._distributed_parts():
                part._init_optimizer_states_with_dummy_values()
        elif not any(self._moments()):
            self._make_moments()
        with self._groups_without_schedule():
            return self._optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=dict(_SHARDING))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with self._groups_without_schedule():
            self._optimizer.load_state_dict(state)
        self._use_one_kernel_for_adam()
        for values in self._moments():
            if "step" in values:
                # All parameters come back sharing one tensor, which every one of them would then advance.
                values["step"] = values["step"].clone()

    @contextmanager
    def _groups_without_schedule(self) -> Iterator[None]:
        """megatron-core tells parameter groups apart by their learning rates too, which `start` sets anew each time."""
        kept = [(group, group.get("max_lr"), group.get("min_lr")) for group in self._optimizer.param_groups]
        try:
            for group, _, _ in kept:
                group["max_lr"] = group["min_lr"] = 0.0
            yield
        finally:
            for group, max_lr, min_lr in kept:
                group["max_lr"], group["min_lr"] = max_lr, min_lr

    def _parts(self) -> list[Any]:
        return getattr(self._optimizer, "chained_optimizers", [self._optimizer])

    def _distributed_parts(self) -> list[DistributedOptimizer]:
        return [part for part in self._parts() if isinstance(part, DistributedOptimizer)]

    def _moments(self) -> list[dict[str, Any]]:
        inner = [part.optimizer for part in self._parts() if getattr(part, "optimizer", None) is not None]
        return list(chain.from_iterable(optimizer.state.values() for optimizer in inner))

    def _use_one_kernel_for_adam(self) -> None:
        """torch's Adam, which megatron-core takes where Apex and TransformerEngine are missing, then goes over its
        tensors once and not a dozen times."""
        for part in self._parts():
            if isinstance(getattr(part, "optimizer", None), torch.optim.Adam):
                for group in part.optimizer.param_groups:
                    group["fused"] = True

    def _make_moments(self) -> None:
        """They are made in the first step, and a checkpoint before that needs them: a step that moves nothing."""
        for part in self._parts():
            groups = part.optimizer.param_groups
            rates = [group["lr"] for group in groups]
            for group in groups:
                group["lr"] = 0.0
                for parameter in group["params"]:
                    if parameter.numel():
                        parameter.grad = torch.zeros_like(parameter)
            part.optimizer.step()
            part.optimizer.zero_grad()
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate
        self._forget_moments()

    def _forget_moments(self) -> None:
        for values in self._moments():
            for value in values.values():
                if isinstance(value, torch.Tensor):
                    value.zero_()
        for group in self._optimizer.param_groups:
            # TransformerEngine's and Apex's Adam count steps in the group, torch's per parameter.
            if "step" in group:
                group["step"] = torch.zeros_like(group["step"]) if isinstance(group["step"], torch.Tensor) else 0


def _adam(model: DistributedDataParallel, optim: OptimConfig, **settings: Any) -> MegatronOptimizer:
    beta1, beta2 = optim.betas
    config = OptimizerConfig(optimizer="adam", adam_beta1=beta1, adam_beta2=beta2, adam_eps=optim.eps, **settings)
    return get_megatron_optimizer(config, [model])


def _without_uncounted_moments(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any] | None:
    """megatron-core saves no count of 0, and torch wants one with the moments, which are all zero then: it makes both
    in the first step."""
    if any("step" not in values for values in state["state"].values()):
        return {**state, "state": {}}
    return None


def _keep_step_out_of_shards() -> None:
    """Keep `step` of torch's AdamW out of the distributed optimizer's sharded state, on CPU and GPU alike.

    Without Apex or TransformerEngine the inner optimizer is torch's AdamW, whose state has a 0-dim `step` beside the
    moments; megatron-core expects moments only. `Optimizer` restores `step` itself.
    """
    if distrib_optimizer.HAVE_APEX_OR_TE:
        return

    def get_states(self: Any, model_param: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        group, order = self.model_param_group_index_map[model_param]
        main_param = self.optimizer.param_groups[group]["params"][order]
        moments = {name: value for name, value in self.optimizer.state[main_param].items() if name != "step"}
        return {"param": main_param, **moments}

    def set_states(self: Any, model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        for name, value in get_states(self, model_param).items():
            value.copy_(tensors[name])

    distrib_optimizer.DistributedOptimizer._get_main_param_and_optimizer_states = get_states
    distrib_optimizer.DistributedOptimizer._set_main_param_and_optimizer_states = set_states


_keep_step_out_of_shards()
