"""A run's configuration: every key is declared by a field of a dataclass (`schema`, `algorithm`, `dataset`).

`settings` says how a key is declared, `reading` checks values after their declarations, `checks` what has to fit
together. NeMo-Aligner's configurations are taken as they are: `aligner` says what becomes of the keys that are not
ours, `review` of all keys.

Everything that can be refused without opening a file is refused by `parse_config`, before anything is loaded.
"""

from __future__ import annotations

from nemo_spin.config.algorithm import AlgorithmConfig, GuardsConfig, LengthParams, LossConfig, SamplingParams
from nemo_spin.config.dataset import ChatPromptTokens, DatasetConfig, TokenizerConfig, ValidationConfig
from nemo_spin.config.files import config_dir
from nemo_spin.config.overrides import addable_overrides, check_overrides, with_shipped_configurations
from nemo_spin.config.parse import parse_config, register_resolvers, resolved, with_checkpoint, with_defaults
from nemo_spin.config.review import notices
from nemo_spin.config.schema import (
    LOGGERS,
    CheckpointConfig,
    EquilibriumConfig,
    ExperimentConfig,
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
    "ChatPromptTokens",
    "CheckpointConfig",
    "DatasetConfig",
    "EquilibriumConfig",
    "ExperimentConfig",
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
    "ValidationConfig",
    "addable_overrides",
    "check_overrides",
    "config_dir",
    "notices",
    "parse_config",
    "register_resolvers",
    "resolved",
    "with_checkpoint",
    "with_defaults",
    "with_shipped_configurations",
]
