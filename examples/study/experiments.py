"""The table of runs: what is run for the study, on what, and with which seeds.

Everything was tuned on seed 0 (learning rates, betas, sizes of models and data, steps of SFT); the study runs on seeds
from 1 on.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import toy_language
from gsm8k_task import GSM8K
from numbers_task import Numbers
from tasks import Shape, Task

# To be raised when the same settings may come to other figures: results are found by their settings.
VERSION = 1


@dataclass(frozen=True, slots=True)
class Scale:
    """seeds, gsm8k_seeds: how many. examples: of the numbers that SPIN trains on, unless a run says otherwise.
    iterations: of SPIN. sft_steps: of the SFT model. held_out: prompts that are measured on. sizes: data sizes, in the
    paper's proportions. few: for the comparison with SFT on limited data. gsm8k_*, toy_*: the same there.
    """

    name: str
    seeds: int
    examples: int
    iterations: int
    sft_steps: int
    held_out: int
    sizes: tuple[int, ...]
    few: tuple[int, ...]
    betas: tuple[float, ...]
    shapes: dict[str, Shape]
    gsm8k_seeds: int
    gsm8k_examples: int
    gsm8k_iterations: int
    gsm8k_sft_steps: int
    gsm8k_held_out: int
    gsm8k_shape: Shape
    toy_examples: int
    toy_iterations: int
    toy_sft_steps: int


_SHAPES = {
    "small": Shape("1 layer of 64", 1, 64),
    "base": Shape("2 layers of 128", 2, 128),
    "large": Shape("3 layers of 192", 3, 192),
}
_BETAS = (0.05, 0.5, 5.0, 50.0, 500.0)
SCALES = {
    "fast": Scale(
        "fast", 2, 128, 2, 60, 128, (64, 128), (64,), (0.5, 50.0),
        {name: _SHAPES[name] for name in ("small", "base")},
        2, 64, 1, 20, 48, Shape("1 layer of 64", 1, 64), 768, 2, 80,
    ),
    "normal": Scale(
        "normal", 4, 1024, 4, 800, 1024, (576, 1088, 2048), (128, 512), _BETAS, _SHAPES,
        3, 992, 3, 310, 384, Shape("2 layers of 128", 2, 128), 6144, 4, 300,
    ),
    "full": Scale(
        "full", 10, 2048, 4, 800, 1400, (576, 1088, 2048), (128, 256, 512, 1024), (0.005, *_BETAS, 5000.0),
        _SHAPES | {"huge": Shape("6 layers of 384", 6, 384, heads=8)},
        10, 992, 4, 310, 384, Shape("4 layers of 256", 4, 256), 24576, 5, 600,
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Job:
    """One run, of one seed.

    kind: start (an SFT model), spin, sft (further SFT in rounds of so many steps) or language (the one with a known
    optimum). shape: of the model; in the language where it starts, far or near. examples: to train on.
    overrides: of conf/gpt_spin_tiny.yaml, beside the task's own.
    """

    task: str
    kind: str
    shape: str
    seed: int
    examples: int = 0
    overrides: tuple[str, ...] = ()
    rounds: tuple[int, ...] = ()
    lr: float = 0.0

    @property
    def start(self) -> Job | None:
        """The job whose model this one starts from."""
        return replace(self, kind="start", examples=0, overrides=(), rounds=(), lr=0.0) if self._needs_start else None

    @property
    def _needs_start(self) -> bool:
        return self.kind in ("spin", "sft")


@dataclass(frozen=True, slots=True)
class Variant:
    """Runs that differ in their seed only. label: in tables and figures."""

    name: str
    label: str
    job: Job
    seeds: tuple[int, ...]

    def jobs(self) -> list[Job]:
        return [replace(self.job, seed=seed) for seed in self.seeds]


def tasks(scale: Scale, gsm8k: Path | None) -> dict[str, Task]:
    """gsm8k: where the data are; None to leave that task out."""
    found: dict[str, Task] = {"numbers": Numbers(scale.sft_steps, scale.held_out, scale.shapes)}
    if gsm8k is not None:
        shapes = {"base": scale.gsm8k_shape}
        found["gsm8k"] = GSM8K(gsm8k, scale.gsm8k_sft_steps, scale.gsm8k_examples, scale.gsm8k_held_out, shapes)
    return found


def steps_of(task: Task, examples: int, iterations: int, epochs: int | None = None, replay: int = 1) -> tuple[int, ...]:
    """Optimizer steps of each iteration of SPIN: with mixing, pairs of iterations before come to its own."""
    per_epoch = -(-examples // task.batch_size)
    return tuple((epochs or task.epochs) * per_epoch * (1 + min(t, replay)) for t in range(iterations))


def table(scale: Scale, known: dict[str, Task]) -> list[Variant]:
    """All variants, in the order in which they are run: short runs last, so that no process waits long for others."""
    text = _gsm8k(scale, known["gsm8k"]) if "gsm8k" in known else []
    return _language(scale) + text + _numbers(scale, known["numbers"])


def key_of(job: Job, scale: Scale, known: dict[str, Task]) -> str:
    """Names the result of a job by all that it depends on."""
    settings: dict[str, Any] = {"version": VERSION, "job": asdict(job)}
    if job.kind == "language":
        settings |= {"overrides": toy_language.OVERRIDES, "steps": scale.toy_sft_steps}
    else:
        task = known[job.task]
        settings |= {
            "sft": asdict(task.sft),
            "data": [task.train, task.held_out],
            "shape": asdict(task.shapes[job.shape]),
        }
        if job.kind == "spin":
            settings["overrides"] = task.overrides
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _seeds(number: int) -> tuple[int, ...]:
    return tuple(range(1, number + 1))


def _iterations(number: int) -> str:
    return f"trainer.spin.max_iterations={number}"


def _language(scale: Scale) -> list[Variant]:
    found = []
    ends = ("trainer.spin.stop_at_equilibrium.accuracy=0.55",)
    for name, label, beta, shape, iterations, options in (
        ("beta 1", "beta 1", 1, "far", scale.toy_iterations, ()),
        ("beta 2", "beta 2", 2, "far", scale.toy_iterations, ()),
        ("beta 4", "beta 4", 4, "far", scale.toy_iterations, ()),
        ("at the data", "beta 2, from a model that has learned the language", 2, "near", scale.toy_iterations, ()),
        ("ends", "beta 2, ends by itself", 2, "far", 2 * scale.toy_iterations, ends),
    ):
        overrides = (f"model.spin.ref_policy_kl_penalty={beta}", _iterations(iterations), *options)
        job = Job("language", "language", shape, 0, scale.toy_examples, overrides)
        found.append(Variant(f"language: {name}", label, job, tuple(10 + seed for seed in _seeds(min(scale.seeds, 3)))))
    return found


def _numbers(scale: Scale, task: Task) -> list[Variant]:
    found: list[Variant] = []
    seeds = _seeds(scale.seeds)

    def spin(name: str, label: str, *overrides: str, iterations: int = scale.iterations, **options: Any) -> None:
        job = Job("numbers", "spin", "base", 0, scale.examples, (_iterations(iterations), *overrides))
        found.append(Variant(name, label, replace(job, **options), seeds))

    def sft(name: str, label: str, rounds: tuple[int, ...], lr: float, **options: Any) -> None:
        job = Job("numbers", "sft", "base", 0, scale.examples, rounds=rounds, lr=lr)
        found.append(Variant(name, label, replace(job, **options), seeds))

    rounds = steps_of(task, scale.examples, scale.iterations)
    for shape, size in scale.shapes.items():
        found.append(
            Variant(f"SFT model, {shape}", f"SFT model, {size.label}", Job("numbers", "start", shape, 0), seeds)
        )
    spin("SPIN", "SPIN")
    sft("further SFT", f"further SFT, lr {task.lr:g}", rounds, task.lr)
    sft("further SFT, low lr", f"further SFT, lr {0.3 * task.lr:g}", rounds, 0.3 * task.lr)
    spin("no refresh", "reference stays the SFT model", "model.spin.refresh_reference=false")
    spin("no mixing", "without mixing", "model.spin.replay_iterations=0")
    epochs = [task.epochs, *[2 * task.epochs] * (scale.iterations - 1)]
    spin(
        "no mixing, equal steps",
        "without mixing, as many steps",
        "model.spin.replay_iterations=0",
        f"trainer.spin.max_epochs=[{','.join(map(str, epochs))}]",
    )
    halved = [max(number // 2, 1) for number in epochs]
    spin(
        "two responses",
        "two responses to each prompt, without mixing, as many steps",
        "model.spin.replay_iterations=0",
        "model.spin.num_generations=2",
        f"trainer.spin.max_epochs=[{','.join(map(str, halved))}]",
    )
    per_epoch = steps_of(task, scale.examples, 1, epochs=1)[0]
    for last in sorted({1, scale.iterations - 1}):
        number = sum(rounds[: last + 1]) // per_epoch
        spin(
            f"iteration 0 as long as 0 to {last}",
            f"iteration 0 alone, {number} epochs",
            f"trainer.spin.max_epochs={number}",
            iterations=1,
        )
    for size in scale.sizes:
        spin(f"data {size}", f"{size} examples", iterations=1, examples=size)
    for size in scale.few:
        longer = task.epochs * scale.examples // size
        spin(
            f"SPIN on {size}",
            f"SPIN, {size} examples",
            f"trainer.spin.max_epochs={longer}",
            iterations=2,
            examples=size,
        )
        for name, lr in (("", task.lr), (", low lr", 0.3 * task.lr)):
            sft(f"SFT on {size}{name}", f"SFT, {size} examples, lr {lr:g}", rounds[:2], lr, examples=size)
    for beta in scale.betas:
        if beta != 5.0:
            spin(f"beta {beta:g}", f"beta {beta:g}", f"model.spin.ref_policy_kl_penalty={beta:g}")
    for loss in ("hinge", "exponential", "correlation"):
        spin(f"loss {loss}", f"loss {loss}", f"model.spin.loss_type={loss}")
    spin("rmsprop", "RMSProp, as in the paper", "model.optim.name=rmsprop", "model.optim.weight_decay=0")
    for shape, size in scale.shapes.items():
        if shape != "base":
            spin(f"SPIN, {shape}", f"SPIN, {size.label}", iterations=min(2, scale.iterations), shape=shape)
    return found


def _gsm8k(scale: Scale, task: Task) -> list[Variant]:
    seeds = _seeds(scale.gsm8k_seeds)
    rounds = steps_of(task, scale.gsm8k_examples, scale.gsm8k_iterations)
    job = Job("gsm8k", "spin", "base", 0, scale.gsm8k_examples, (_iterations(scale.gsm8k_iterations),))
    found = [
        Variant("gsm8k: SFT model, base", "SFT model", Job("gsm8k", "start", "base", 0), seeds),
        Variant("gsm8k: SPIN", "SPIN", job, seeds),
    ]
    for name, lr in (("", task.lr), (", low lr", 0.3 * task.lr)):
        control = Job("gsm8k", "sft", "base", 0, scale.gsm8k_examples, rounds=rounds, lr=lr)
        found.append(Variant(f"gsm8k: further SFT{name}", f"further SFT, lr {lr:g}", control, seeds))
    return found
