"""`model.optim`: the optimizer and its schedule."""

from __future__ import annotations

from nemo_spin.config.schema import OptimConfig, SchedConfig
from nemo_spin.config.values import Section

_OPTIMIZERS = ("adam", "adamw", "fused_adam", "distributed_fused_adam", "mcore_distributed_optim", "rmsprop")
_SCHEDULES = ("CosineAnnealing", "LinearAnnealing", "Constant")


def parse_optim(section: Section, max_iterations: int) -> OptimConfig:
    """`model.optim`, with a learning rate for each iteration. Raises ConfigError."""
    betas = section.numbers("betas", (0.9, 0.98))
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise section.error("betas", "use two numbers from 0 to below 1, such as [0.9, 0.98]")
    lr = section.per_iteration("lr", max_iterations)
    sched = section.section("sched")
    min_lr = sched.number("min_lr", 0.0, minimum=0.0)
    if min_lr > min(lr):
        raise sched.error("min_lr", f"it must not be above the learning rate model.optim.lr = {min(lr)}")
    name = section.choice("name", _OPTIMIZERS, "distributed_fused_adam")
    weight_decay = section.number("weight_decay", 0.0, minimum=0.0)
    if name == "rmsprop" and weight_decay:
        raise section.error("weight_decay", "torch's RMSProp would divide it by the gradient's size; set it to 0")
    alpha = section.number("alpha", 0.99, minimum=0.0)
    if alpha >= 1.0:
        raise section.error("alpha", "use a number from 0 to below 1")
    return OptimConfig(
        name=name,
        lr=lr,
        weight_decay=weight_decay,
        alpha=alpha,
        betas=(betas[0], betas[1]),
        eps=section.number("eps", 1e-8, above=0.0),
        sched=SchedConfig(
            name=sched.choice("name", _SCHEDULES, "Constant"),
            warmup_steps=sched.integer("warmup_steps", 0, minimum=0),
            constant_steps=sched.integer("constant_steps", 0, minimum=0),
            min_lr=min_lr,
        ),
    )
