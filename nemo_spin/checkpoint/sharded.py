"""Writing sharded state with megatron-core, with an error for people where the disk does not take it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from nemo_spin.errors import UserError


def save_sharded(state: dict[str, Any], directory: Path) -> None:
    """Write a torch_dist directory; every rank calls it. Raises UserError if the disk is full or cannot be written."""
    try:
        dist_checkpointing.save(state, str(directory))
    except (OSError, CheckpointException) as error:
        # The workers that write hand on their errors as text, to the first rank only.
        reasons = re.findall(r"\[Errno \d+\] ([^:\n]+)", str(error)) or ["see the messages of the other processes"]
        raise UserError(
            f"{directory} cannot be written ({reasons[0]}): make room, and run the same command again."
        ) from error
