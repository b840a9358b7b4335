"""Restores `.nemo` archives with NeMo 1's own code; run by check_with_nemo.py in an environment that has it."""

from __future__ import annotations

import os
from typing import Any

import cpu_stubs
import nemo.collections.nlp.models.language_modeling.megatron_gpt_model as megatron_gpt_model
import nemo.collections.nlp.modules.common.megatron.build_model as build_model
import nemo.collections.nlp.parts.nlp_overrides as nlp_overrides
import torch
from lightning.pytorch import Trainer
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import set_defaults_if_not_set_tensor_model_parallel_attributes
from omegaconf import OmegaConf

STUBS = [
    *cpu_stubs.STUBS,
    "Apex: NeMo is told that it is there; its one function that is called is taken from megatron-core",
    "the process group is made before the model, because the local layers ask for it",
]


def install() -> None:
    cpu_stubs.install()
    nlp_overrides.HAVE_APEX = True
    build_model.set_defaults_if_not_set_tensor_model_parallel_attributes = (
        set_defaults_if_not_set_tensor_model_parallel_attributes
    )
    megatron_gpt_model.get_specs = lambda name, config, *_: cpu_stubs.layers(config)
    os.environ.update(MASTER_ADDR="127.0.0.1", RANK="0", WORLD_SIZE="1")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()


def restore(case: dict[str, Any]) -> tuple[str, float]:
    install()
    model_class, connector = megatron_gpt_model.MegatronGPTModel, nlp_overrides.NLPSaveRestoreConnector()
    trainer = Trainer(
        accelerator="cpu", devices=1, strategy=nlp_overrides.NLPDDPStrategy(), logger=False, enable_checkpointing=False
    )
    options: dict[str, Any] = {"trainer": trainer, "map_location": "cpu", "save_restore_connector": connector}
    overridden = ""
    if case.get("override"):
        config = model_class.restore_from(case["path"], return_config=True, **options)
        config = OmegaConf.merge(config, case["override"])
        options["override_config_path"] = config
        overridden = f" with {', '.join(OmegaConf.to_container(OmegaConf.create(case['override'])))} overridden"
    model = model_class.restore_from(case["path"], **options)
    found = model.tokenizer.text_to_ids(case["text"])
    if found != case["ids"]:
        raise AssertionError(f"{type(model.tokenizer).__name__} makes {found} of {case['text']!r}, not {case['ids']}")
    where = f"{type(model).__name__}, {type(model.tokenizer).__name__}{overridden}"
    return f"restore_from: {where}; logits", cpu_stubs.difference(model.model, torch.load(case["truth"]))


if __name__ == "__main__":
    cpu_stubs.run_cases(restore, STUBS)
