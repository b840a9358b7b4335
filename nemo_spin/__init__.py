"""nemo_spin: Self-Play Fine-Tuning (SPIN) on megatron-core, for NeMo.

Public names are resolved when they are first used, so that the plain-torch parts import without NeMo or megatron-core.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "MegatronGPTSPINModel": "nemo_spin.model",
    "SPINTrainer": "nemo_spin.trainer",
    "spin_loss": "nemo_spin.selfplay.losses",
}
__all__ = [*_PUBLIC, "__version__"]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'nemo_spin' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
