"""Rotary angles whose cosines and sines are computed once for all layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class RotaryAngles(Tensor):
    """Angles that remember their cosines and sines.

    megatron-core takes them anew in every layer, for queries and for keys: a tenth of a decode step on a CPU.
    """

    _known: dict[Callable, Tensor]

    @classmethod
    def of(cls, angles: Tensor) -> RotaryAngles:
        remembering = angles.as_subclass(cls)
        remembering._known = {}
        return remembering

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Every other operation sees, and returns, an ordinary tensor."""
        with torch._C.DisableTorchFunctionSubclass():
            if func not in (torch.cos, torch.sin):
                return func(*args, **(kwargs or {}))
            known = args[0]._known
            if func not in known:
                known[func] = func(args[0])
            return known[func]
