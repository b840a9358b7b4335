"""Lets megatron-core run on CPU with gloo: the same code path as on a GPU, for tests, laptops and the quick start.

megatron-core asks torch.cuda for devices, streams and random states in a few places and compares tensor type strings
in its optimizers. Without CUDA those calls are answered here; with CUDA this module does nothing.
A TorchFunctionMode would need no list of names, but doubles the cost of every small operation.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._device import _device_constructors

_installed = False


class _Stream:
    """Work on the CPU is done when the call returns: there is nothing to wait for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()

    def query(self) -> bool:
        return True

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *exc: object) -> bool:
        return False


class _Event:
    """A point in host time."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._seconds = 0.0

    def record(self, stream: Any = None) -> None:
        self._seconds = time.perf_counter()

    def synchronize(self) -> None: ...
    def wait(self, stream: Any = None) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: _Event) -> float:
        """Milliseconds between two events."""
        return (end._seconds - self._seconds) * 1e3


def _names_a_cuda_device(device: Any) -> bool:
    return (isinstance(device, int) and not isinstance(device, bool)) or str(device).startswith("cuda")


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") is not None and _names_a_cuda_device(kwargs["device"]):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return create


def _patch_cuda_module() -> None:
    stream = _Stream()
    replacements: dict[str, Any] = {
        "current_device": lambda: torch.device("cpu"),
        "set_device": lambda *args, **kwargs: None,
        "synchronize": lambda *args, **kwargs: None,
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": lambda *args, **kwargs: stream,
        "default_stream": lambda *args, **kwargs: stream,
        "stream": lambda *args, **kwargs: contextlib.nullcontext(),
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
        "manual_seed": torch.manual_seed,
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)


def _patch_tensors() -> None:
    # `with torch.device(...)` remembers the factories that it acts on, by identity, when it is first used: it has to
    # know torch's own. transformers' from_pretrained, for one, would leave rotary frequencies uninitialized.
    _device_constructors()
    for name in ("tensor", "zeros", "empty", "empty_like"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))

    plain_type = torch.Tensor.type

    def cuda_type(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        # The bf16 and the distributed optimizer sort parameters by strings such as 'torch.cuda.BFloat16Tensor'.
        if dtype is None and not kwargs:
            return plain_type(self).replace("torch.", "torch.cuda.", 1)
        return plain_type(self, dtype, *args, **kwargs)

    torch.Tensor.type = cuda_type
    torch.Tensor.cuda = lambda self, *args, **kwargs: self


def _patch_megatron_random() -> None:
    from megatron.core.tensor_parallel import random

    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()


def install() -> None:
    """Answer megatron-core's CUDA calls on a machine without CUDA. Does nothing with CUDA, or the second time."""
    global _installed
    if _installed or torch.cuda.is_available():
        return
    _patch_cuda_module()
    _patch_tensors()
    _patch_megatron_random()
    _installed = True
