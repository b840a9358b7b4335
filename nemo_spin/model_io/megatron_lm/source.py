"""Opening a checkpoint of Megatron-LM or Megatron-Bridge: the directory of a run, or of one of its iterations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_spin.errors import CheckpointError
from nemo_spin.model_io.megatron_lm import args as megatron_args
from nemo_spin.model_io.megatron_lm import bridge as megatron_bridge
from nemo_spin.model_io.megatron_lm.directory import RUN_CONFIG, Iteration
from nemo_spin.model_io.megatron_lm.tokenizer import from_megatron
from nemo_spin.model_io.source import CheckpointSource, layout_in
from nemo_spin.model_io.stores.common_state import read_common_state
from nemo_spin.model_io.stores.interface import WeightStore
from nemo_spin.model_io.stores.torch_dist import TorchDistStore, read_backend
from nemo_spin.model_io.stores.zarr import ZarrStore
from nemo_spin.model_io.untrusted.plain_data import PlainDataError, read_yaml


def open_iteration(found: Iteration) -> CheckpointSource:
    """The checkpoint that `megatron_directory.find_iteration` found.

    Megatron-Bridge's run_config.yaml counts where there is one, as Megatron-Bridge has it. Raises CheckpointError.
    """
    path = found.path
    family, config, where = _configuration(path)
    store = _store(path)
    if family == "bridge":
        tokenizer = from_megatron(config.get("tokenizer"), path, str(path))
        make = megatron_bridge.architecture_from_run_config
    else:
        tokenizer = from_megatron(config, path, str(path))
        make = megatron_args.architecture_from_args
    return CheckpointSource(
        path,
        family,
        read_backend(path, str(path)),
        config,
        tokenizer,
        path,
        chosen=found.notice,
        trained_layout=layout_in(config.get("model") or {} if family == "bridge" else config),
        _store=store,
        _architecture=lambda vocab_size: make(config, store.tensors, vocab_size, where),
    )


def _configuration(path: Path) -> tuple[str, Mapping[str, Any], str]:
    """Family, configuration, and what to call it in messages."""
    file = path / RUN_CONFIG
    where = f"{path}: {RUN_CONFIG}"
    if file.is_file():
        try:
            config = read_yaml(file)
        except (PlainDataError, OSError) as error:
            raise CheckpointError(f"{where} is no YAML of plain data: {error}.") from None
        if not isinstance(config, dict):
            raise CheckpointError(f"{where} is no mapping.")
        megatron_bridge.refuse_adapters(config, where)
        return "bridge", config, where
    args = read_common_state(path, str(path)).get("args")
    if not isinstance(args, dict):
        raise CheckpointError(
            f"{path} holds weights, but no configuration of the model: neither {RUN_CONFIG} of Megatron-Bridge nor the "
            "args that Megatron-LM stores; a run that was started with --ckpt-format torch_dist stores them."
        )
    return "megatron", args, f"{path}: args"


def _store(path: Path) -> WeightStore:
    layout = read_backend(path, str(path))
    make = ZarrStore if layout == "zarr" else TorchDistStore
    return make(path, megatron_args.KEY_PREFIX, str(path))
