"""Keeps the terminal for what a user can act on: silences what libraries say about themselves while being imported.

In effect once it is imported, so the command line imports it first.
"""

from __future__ import annotations

import logging
import warnings

# megatron-core without TransformerEngine, hydra on its version_base
warnings.filterwarnings("ignore", message="(Transformer Engine and )?Apex (is|are) not installed")
warnings.filterwarnings("ignore", message="full scope is deprecated")  # megatron-core, of its own default
warnings.filterwarnings("ignore", category=UserWarning, module=r"hydra\._internal")

for _name in (
    "nv_one_logger.api.config",  # telemetry that NeMo sets up and nobody configured
    "nv_one_logger.training_telemetry.api.training_telemetry_provider",
    "torch.utils.cpp_extension",  # no CUDA runtime
):
    logging.getLogger(_name).setLevel(logging.ERROR)

# The first process of every pipeline stage lists the parameters of every bucket.
logging.getLogger("megatron.core").setLevel(logging.WARNING)
