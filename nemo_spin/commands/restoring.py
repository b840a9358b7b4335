"""A checkpoint's model on the processes of a command."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from omegaconf import OmegaConf

from nemo_spin.megatron import setup
from nemo_spin.model import MegatronGPTSPINModel


@contextmanager
def restored(checkpoint: str, options: dict[str, Any]) -> Iterator[MegatronGPTSPINModel]:
    """The model, for as long as the block lasts; every process calls it. Raises UserError.

    options: precision, layout and tokenizer, as `MegatronGPTSPINModel.restore_from` takes them.
    """
    setup.initialize(options["tensor_model_parallel_size"], options["pipeline_model_parallel_size"], seed=0)
    try:
        yield MegatronGPTSPINModel.restore_from(checkpoint, override_config_path=OmegaConf.create(options))
    finally:
        setup.shutdown()
