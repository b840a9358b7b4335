"""A run's configuration: what its keys mean (`schema`), which exist (`keys`), and how they are checked (`parse`).

NeMo-Aligner's configurations are taken as they are: `unread` and `translate` say what becomes of the keys that are not
ours, `review` of all keys.

Everything that can be refused without opening a file is refused by `parse_config`, before anything is loaded.
"""

from __future__ import annotations

from nemo_spin.config.algorithm import AlgorithmConfig, GuardsConfig, LengthParams, LossConfig, SamplingParams
from nemo_spin.config.dataset import DatasetConfig, TokenizerConfig
from nemo_spin.config.files import config_dir
from nemo_spin.config.overrides import addable_overrides, check_overrides, with_shipped_configurations
from nemo_spin.config.parse import LOGGERS, parse_config, register_resolvers, resolved, with_defaults
from nemo_spin.config.parse_algorithm import parse_sampling
from nemo_spin.config.review import notices
from nemo_spin.config.schema import (
    CheckpointConfig,
    EquilibriumConfig,
    LoopConfig,
    OptimConfig,
    ParallelConfig,
    RecomputeConfig,
    SchedConfig,
    SpinConfig,
)

__all__ = [
    "LOGGERS",
    "AlgorithmConfig",
    "CheckpointConfig",
    "DatasetConfig",
    "EquilibriumConfig",
    "GuardsConfig",
    "LengthParams",
    "LoopConfig",
    "LossConfig",
    "OptimConfig",
    "ParallelConfig",
    "RecomputeConfig",
    "SamplingParams",
    "SchedConfig",
    "SpinConfig",
    "TokenizerConfig",
    "addable_overrides",
    "check_overrides",
    "config_dir",
    "notices",
    "parse_config",
    "parse_sampling",
    "register_resolvers",
    "resolved",
    "with_defaults",
    "with_shipped_configurations",
]
