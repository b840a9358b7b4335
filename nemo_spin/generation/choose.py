"""Which engine generates: this package's own, or megatron-core's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_spin.errors import ConfigError
from nemo_spin.generation.engine import Generator
from nemo_spin.generation.interface import Engine
from nemo_spin.generation.rules import Rules

if TYPE_CHECKING:
    from megatron.core.models.gpt.gpt_model import GPTModel

    from nemo_spin.megatron.architecture import Architecture

OWN, MEGATRON = "nemo_spin", "megatron"


def make_engine(
    name: str, model: GPTModel, rules: Rules, slots: int | None = None, kv_cache_gib: float | None = None
) -> Engine:
    """The engine of this name (`model.spin.generation_engine`); the other arguments are those of `Engine`."""
    if name != MEGATRON:
        return Generator(model, rules, slots, kv_cache_gib)
    # Only here, because it imports all of megatron-core's inference.
    from nemo_spin.generation.megatron_engine import MegatronEngine

    return MegatronEngine(model, rules, slots, kv_cache_gib)


def check_engine(name: str, architecture: Architecture, precision: str) -> None:
    """Raises ConfigError, in one sentence, if this engine cannot generate with this model on this machine."""
    if name != MEGATRON:
        return
    try:
        from nemo_spin.generation.megatron_engine_parts import obstacle
    except ImportError as error:
        reason = f"this megatron-core has no dynamic engine that is known here ({error})"
    else:
        reason = obstacle(architecture.transformer["softmax_scale"], precision)
    if reason:
        raise ConfigError(
            f"model.spin.generation_engine megatron cannot be used: {reason}; set it to {OWN}.",
            "model.spin.generation_engine",
        )
