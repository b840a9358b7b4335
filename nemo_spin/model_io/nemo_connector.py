"""Reading and writing a model through NeMo's SaveRestoreConnector; what NeMo is particular about ends here.

NeMo makes a model from an archive by calling its class with a configuration, and hands over the rest in class state and
in a global `AppState`. A model asks `being_restored_from` first of all, and calls `after_restoring` last of all.
"""

from __future__ import annotations

from contextvars import ContextVar
from pathlib import Path
from typing import Any, Protocol

import torch
from nemo.core.classes import ModelPT
from nemo.core.connectors.save_restore_connector import SaveRestoreConnector
from nemo.utils.app_state import AppState
from omegaconf import DictConfig, OmegaConf

from nemo_spin.errors import CheckpointError
from nemo_spin.model_io.export import Content, export
from nemo_spin.model_io.nemo1.config import to_nemo1_config
from nemo_spin.model_io.open import open_checkpoint
from nemo_spin.model_io.untrusted.interpolation import may_interpolate

# Whether the model that is being restored is restored by the connector below, and not by NeMo's own.
_by_own_connector: ContextVar[bool] = ContextVar("by_own_connector", default=False)


class HasContent(Protocol):
    """A model that can say what a checkpoint of it is made of."""

    def content(self) -> Content: ...


def being_restored_from(model_class: type[ModelPT]) -> str | None:
    """The checkpoint from which NeMo is restoring a model of this class; None where it is made from a configuration.

    Raises CheckpointError for one that NeMo's own connector, if that is restoring it, should not see.
    """
    if not model_class._is_model_being_restored():
        return None
    folder = AppState().nemo_file_folder
    if not _by_own_connector.get():
        _check_before_nemo(folder)
    return folder


def after_restoring(folder: str) -> None:
    """Leave what NeMo's own connector looks for next in the folder into which it has unpacked the archive.

    That is a state_dict, empty here. It is not in the archive: NeMo 1 would take it for the weights, and not look at
    model_weights/.
    """
    if not _by_own_connector.get():
        torch.save({}, Path(folder) / "model_weights.ckpt")


def _check_before_nemo(path: str | Path) -> None:
    """Raises CheckpointError for a checkpoint that NeMo's own connector should not see.

    That unpacks an archive without limits, resolves interpolations, environment variables among them, and makes what a
    `_target_` at the root of its configuration names.
    """
    with open_checkpoint(path) as source:
        config = source.config
        source.architecture()
    name = next((key for key in ("_target_", "cls", "params") if key in config), None)
    if source.family == "nemo1" and (name or may_interpolate(config)):
        raise CheckpointError(
            f"{path}: model_config.yaml {f'has a {name}' if name else 'refers to what is not in it'}, which NeMo's "
            "connector would act on: leave save_restore_connector out."
        )


def check_before_restoring(path: str, connector: Any) -> None:
    """Raises CheckpointError, in one sentence, if there is no checkpoint, or none that NeMo's connector should see."""
    if not isinstance(connector, SPINSaveRestoreConnector):
        _check_before_nemo(connector.model_extracted_dir or path)
    elif not Path(path).expanduser().exists():
        with open_checkpoint(path):
            pass


class SPINSaveRestoreConnector(SaveRestoreConnector):
    """Reads checkpoints of every family, in any layout; writes NeMo 1 archives."""

    def save_to(self, model: HasContent, save_path: str) -> None:
        """Every process calls it. The archive is built beside `save_path` and renamed when it is whole."""
        export(model.content(), Path(save_path), "nemo")

    def restore_from(
        self,
        calling_cls: type[ModelPT],
        restore_path: str,
        override_config_path: DictConfig | str | None = None,
        map_location: Any = None,
        strict: bool = True,
        return_config: bool = False,
        trainer: Any = None,
        validate_access_integrity: bool = True,
    ) -> ModelPT | DictConfig:
        """See `ModelPT.restore_from`. `override_config_path` is laid over the stored configuration.

        The device and the layout are those of the process groups.
        """
        config = stored_config(restore_path)
        if override_config_path is not None:
            overriding = override_config_path
            if not isinstance(overriding, DictConfig):
                overriding = OmegaConf.load(overriding)
            overriding = overriding.get("model", overriding)
            config = OmegaConf.merge(config, OmegaConf.to_container(overriding, resolve=True))
        if return_config:
            return config
        calling_cls._set_model_restore_state(is_being_restored=True, folder=restore_path)
        token = _by_own_connector.set(True)
        try:
            return calling_cls(cfg=config, trainer=trainer)
        finally:
            _by_own_connector.reset(token)
            calling_cls._set_model_restore_state(is_being_restored=False)


def stored_config(path: str) -> DictConfig:
    """A checkpoint's configuration in NeMo 1's names, whatever its family; layout 1 x 1, for a layout is not stored."""
    with open_checkpoint(path) as source:
        precision = "bf16" if all(t.dtype == torch.bfloat16 for t in source.tensors.values()) else "32"
        config = to_nemo1_config(source.architecture(), precision)
    return OmegaConf.create({**config, "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1})
