"""Opening a checkpoint of Megatron-LM or Megatron-Bridge: the directory of a run, or of one of its iterations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_spin.errors import CheckpointError
from nemo_spin.model_io.megatron_lm.args import MEGATRON_PREFIX, architecture_from_args
from nemo_spin.model_io.megatron_lm.bridge import architecture_from_run_config, refuse_adapters
from nemo_spin.model_io.megatron_lm.directory import RUN_CONFIG, Iteration
from nemo_spin.model_io.megatron_lm.tokenizer import from_megatron
from nemo_spin.model_io.source import CheckpointSource, layout_in
from nemo_spin.model_io.stores.common_state import read_common_state
from nemo_spin.model_io.stores.open import open_store
from nemo_spin.model_io.untrusted.plain_data import read_mapping


def open_megatron_iteration(found: Iteration) -> CheckpointSource:
    """The checkpoint that `find_iteration` found.

    Megatron-Bridge's run_config.yaml counts where there is one, as Megatron-Bridge has it. Raises CheckpointError.
    """
    path = found.path
    if (path / RUN_CONFIG).is_file():
        where = f"{path}: {RUN_CONFIG}"
        config = read_mapping(path / RUN_CONFIG, where)
        refuse_adapters(config, where)
        family, make = "bridge", architecture_from_run_config
        tokenizer, layout = config.get("tokenizer"), layout_in(config.get("model") or {})
    else:
        where = f"{path}: args"
        config = _args(path)
        family, make = "megatron", architecture_from_args
        tokenizer, layout = config, layout_in(config)
    store = open_store(path, MEGATRON_PREFIX, str(path))
    return CheckpointSource(
        path,
        family,
        store.layout,
        config,
        from_megatron(tokenizer, path, str(path)),
        path,
        chosen=found.notice,
        trained_layout=layout,
        _store=store,
        _architecture=lambda vocab_size: make(config, store.tensors, vocab_size, where),
    )


def _args(path: Path) -> Mapping[str, Any]:
    args = read_common_state(path, str(path)).get("args")
    if not isinstance(args, dict):
        raise CheckpointError(
            f"{path} holds weights, but no configuration of the model: neither {RUN_CONFIG} of Megatron-Bridge nor the "
            "args that Megatron-LM stores; a run that was started with --ckpt-format torch_dist stores them."
        )
    return args
