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
import torch.distributed as dist
from torch import Tensor

from nemo_spin.checkpoint.fingerprint import fingerprint
from nemo_spin.checkpoint.opening import open_checkpoint


class Reference:
    """Remembers the reference weights of one process's part of a model.

    keep_copy: hold the reference in (pinned) host memory, so that it can be swapped in after the policy has moved on.
    """

    def __init__(self, model: torch.nn.Module, keep_copy: bool) -> None:
        self._model = model
        self._keep_copy = keep_copy
        self._copy: dict[str, Tensor] = {}
        self._policy_has_moved = False
        self.refresh()

    def refresh(self) -> None:
        """The policy becomes the reference: the opponent of the next iteration."""
        self._policy_has_moved = False
        if self._keep_copy:
            for name, parameter in self._model.named_parameters():
                if name not in self._copy:
                    self._copy[name] = torch.empty_like(
                        parameter, device="cpu", pin_memory=torch.cuda.is_available()
                    ).requires_grad_(False)
                self._copy[name].copy_(parameter.detach())

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
        of_ranks = [""] * dist.get_world_size()
        dist.all_gather_object(of_ranks, digest.hexdigest())
        return "weights-" + hashlib.sha256(" ".join(sorted(set(of_ranks))).encode()).hexdigest()[:40]

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
        policy = {name: parameter.detach().to("cpu", copy=True) for name, parameter in self._model.named_parameters()}
        try:
            self._write(self._copy)
            yield
        finally:
            self._write(policy)

    @torch.no_grad()
    def _write(self, weights: dict[str, Tensor]) -> None:
        # In place: under data parallelism parameters are views into shared buffers, which must stay what they are.
        for name, parameter in self._model.named_parameters():
            parameter.copy_(weights[name])


def name_of_checkpoint(path: str | Path) -> str:
    """A name of the weights in a checkpoint, the same for a copy of it and on every process, which all have to ask.

    Raises CheckpointError.
    """
    name = [""]
    if dist.get_rank() == 0:
        with open_checkpoint(path) as source:
            name = ["checkpoint-" + fingerprint(source.path)[:40]]
    dist.broadcast_object_list(name, src=0)
    return name[0]
