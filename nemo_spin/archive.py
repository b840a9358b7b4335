"""Reading and writing the model's `.nemo` through NeMo's SaveRestoreConnector.

model_config.yaml     the architecture in NeMo 1's names, the tokenizer, and `target`, this package's model class
model_weights/        torch_dist, for every parallel layout
model_weights.ckpt    an empty state_dict, which NeMo's own connector asks for; the model reads model_weights/
tokenizer files
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from nemo.core.connectors.save_restore_connector import SaveRestoreConnector
from omegaconf import DictConfig, OmegaConf

from nemo_spin.checkpoint import nemo_archive
from nemo_spin.checkpoint.nemo1 import to_nemo1_config
from nemo_spin.checkpoint.opening import open_checkpoint
from nemo_spin.checkpoint.weights import save_weights

if TYPE_CHECKING:
    from nemo_spin.model import MegatronGPTSPINModel


class SPINSaveRestoreConnector(SaveRestoreConnector):
    """Reads NeMo 1 archives (packed or not) and NeMo 2 directories in any layout; writes NeMo 1 archives."""

    def save_to(self, model: MegatronGPTSPINModel, save_path: str) -> None:
        """Every process calls it. The archive is built beside `save_path` and renamed when it is whole."""
        target = Path(save_path)
        folder = target.with_name(f".unfinished-{target.name}.d")
        is_main = dist.get_rank() == 0
        try:
            if is_main:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
            dist.barrier()
            save_weights(model.gpt, folder / nemo_archive.WEIGHTS, model.architecture.vocab_rows)
            if is_main:
                torch.save({}, folder / self.model_weights_ckpt)
                config = archived_config(model, model.tokenizer.save(folder))
                OmegaConf.save(config, folder / self.model_config_yaml)
                nemo_archive.pack(folder, target)
            dist.barrier()
        finally:
            if is_main:
                shutil.rmtree(folder, ignore_errors=True)

    def restore_from(
        self,
        calling_cls: type[MegatronGPTSPINModel],
        restore_path: str,
        override_config_path: DictConfig | str | None = None,
        map_location: Any = None,
        strict: bool = True,
        return_config: bool = False,
        trainer: Any = None,
        validate_access_integrity: bool = True,
    ) -> MegatronGPTSPINModel | DictConfig:
        """See `MegatronGPTSPINModel.restore_from`. The device and the layout are those of the process groups."""
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
        try:
            return calling_cls(cfg=config, trainer=trainer)
        finally:
            calling_cls._set_model_restore_state(is_being_restored=False)


def stored_config(path: str) -> DictConfig:
    """A checkpoint's configuration in NeMo 1's names, whatever its family; layout 1 x 1, for a layout is not stored."""
    with open_checkpoint(path) as source:
        precision = "bf16" if all(t.dtype == torch.bfloat16 for t in source.tensors.values()) else "32"
        config = to_nemo1_config(source.architecture(), precision)
    return OmegaConf.create({**config, "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1})


def archived_config(model: MegatronGPTSPINModel, tokenizer: dict[str, Any]) -> DictConfig:
    """model_config.yaml of the model: what it is, not how it was laid out."""
    own = {key: model.cfg[key] for key in ("target", "nemo_version", "spin", "optim", "seed") if key in model.cfg}
    return OmegaConf.create(
        {
            **to_nemo1_config(model.architecture, model.precision),
            **OmegaConf.to_container(OmegaConf.create(own), resolve=True),
            "tensor_model_parallel_size": 1,
            "pipeline_model_parallel_size": 1,
            "tokenizer": tokenizer,
        }
    )
