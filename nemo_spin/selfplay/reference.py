"""The reference policy: the weights of the policy as they were when the iteration began.

At the start of an iteration they are the policy's own, so a reference that is needed only then costs nothing. Only
where rollouts are made later in the iteration does a copy exist, in host memory; it is swapped in for generation and
log-probabilities together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from nemo_spin.model_io.fingerprint import fingerprint
from nemo_spin.model_io.open import open_checkpoint
from nemo_spin.runtime.collectives import gathered, of_first


class Reference:
    """Remembers the reference weights of one process's part of a model.

    keep_copy: hold the reference in (pinned) host memory, so that it can be swapped in after the policy has moved on.
    """

    def __init__(self, model: torch.nn.Module, keep_copy: bool) -> None:
        self._model = model
        self._copy = self._on_host() if keep_copy else {}
        self._policy_aside: dict[str, Tensor] = {}
        self._policy_has_moved = False
        self.refresh()

    def refresh(self) -> None:
        """The policy becomes the reference: the opponent of the next iteration."""
        self._policy_has_moved = False
        if self._copy:
            self._exchange(aside=self._copy)
            torch.cuda.synchronize()

    def policy_moved(self) -> None:
        """Tell that an optimizer step has made the policy differ from the reference."""
        self._policy_has_moved = True

    @property
    def is_away(self) -> bool:
        """Whether a copy of the reference is kept and the policy has moved away from it."""
        return self._policy_has_moved and bool(self._copy)

    def name(self) -> str:
        """A hash of the reference's weights, the same on every process: rollouts are used again by this name.

        Of the weights of all ranks, each taken once, so that only the model-parallel layout changes it. To be asked
        before the policy moves, unless a copy is kept. Every process has to ask.
        """
        digest = hashlib.sha256()
        for name, parameter in sorted(self._copy.items() or self._model.named_parameters()):
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
            digest.update(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy())
        of_ranks = sorted(set(gathered(digest.hexdigest())))
        return "weights-" + hashlib.sha256(" ".join(of_ranks).encode()).hexdigest()[:40]

    @property
    def weights(self) -> dict[str, Tensor] | None:
        """The copy by parameter name, or None where none is kept."""
        return self._copy or None

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor]) -> None:
        """Restore a copy that a checkpoint held."""
        for name, value in weights.items():
            self._copy[name].copy_(value)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside, the model computes with the reference's weights; afterwards with the policy's, bit for bit.

        Raises RuntimeError if the policy has moved and no copy was kept: rollouts would come from the wrong model.
        """
        if not self._policy_has_moved:
            yield
            return
        if not self._copy:
            raise RuntimeError("the policy has moved and no copy of the reference was kept")
        # Kept from one window to the next: to pin memory takes longer than to copy to it.
        self._policy_aside = self._policy_aside or self._on_host()
        self._exchange(aside=self._policy_aside, into=self._copy)
        try:
            yield
        finally:
            self._exchange(into=self._policy_aside)

    def _on_host(self) -> dict[str, Tensor]:
        """Room for all weights in host memory, pinned on a machine with CUDA."""
        pinned = torch.cuda.is_available()
        return {
            name: torch.empty_like(parameter, device="cpu", pin_memory=pinned, requires_grad=False)
            for name, parameter in self._model.named_parameters()
        }

    @torch.no_grad()
    def _exchange(self, aside: dict[str, Tensor] | None = None, into: dict[str, Tensor] | None = None) -> None:
        """Copy the model's weights aside, or others into it, or both.

        The two directions have a CUDA stream each, so that one weight comes while the next one goes.
        """
        now, going, coming = torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()
        for stream in (going, coming):
            stream.wait_stream(now)
        for name, parameter in self._model.named_parameters():
            if aside is not None:
                with torch.cuda.stream(going):
                    aside[name].copy_(parameter, non_blocking=True)
                coming.wait_stream(going)
            if into is not None:
                # In place: under data parallelism parameters are views into shared buffers, which must stay.
                with torch.cuda.stream(coming):
                    parameter.copy_(into[name], non_blocking=True)
        for stream in (going, coming):
            now.wait_stream(stream)


def name_of_checkpoint(path: str | Path) -> str:
    """A name of the weights in a checkpoint, the same for a copy of it and on every process, which all have to ask.

    Raises CheckpointError.
    """

    def name() -> str:
        with open_checkpoint(path) as source:
            return "checkpoint-" + fingerprint(source.path)[:40]

    return of_first(name)
