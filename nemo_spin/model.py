"""The model that NeMo knows: a ModelPT that holds a GPT and its tokenizer, and reads and writes checkpoints.

It registers the package with NeMo, so that NeMo restores archives that name this class.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from nemo.core.classes import ModelPT
from nemo.core.classes import common as nemo_common
from omegaconf import DictConfig, OmegaConf

from nemo_spin.config import RecomputeConfig, SamplingParams, SpinConfig
from nemo_spin.errors import UserError
from nemo_spin.generation.choose import make_engine
from nemo_spin.generation.end_strings import ends_with_any
from nemo_spin.generation.interface import Engine
from nemo_spin.megatron import setup
from nemo_spin.megatron.architecture import Architecture, check_layout
from nemo_spin.megatron.gpt import build_gpt
from nemo_spin.megatron.steps import Batching
from nemo_spin.model_io.export import Content, LiveWeights
from nemo_spin.model_io.nemo1.config import architecture_from_nemo1
from nemo_spin.model_io.nemo_connector import (
    SPINSaveRestoreConnector,
    after_restoring,
    being_restored_from,
    check_before_restoring,
)
from nemo_spin.model_io.open import open_checkpoint
from nemo_spin.model_io.stores.interface import EMBEDDING, StoredTensor
from nemo_spin.model_io.tokenizers import build_tokenizer, check_tokenizer_fits, restore_tokenizer
from nemo_spin.model_io.tokenizers.description import from_nemo1
from nemo_spin.model_io.weights import load_weights
from nemo_spin.selfplay.megatron_policy import MegatronPolicy

if "nemo_spin." not in nemo_common.ALLOWED_TARGET_PREFIXES:
    nemo_common.ALLOWED_TARGET_PREFIXES.append("nemo_spin.")


class MegatronGPTSPINModel(ModelPT):
    """A GPT in its parallel layout, with its tokenizer.

    Made by `restore_from` (a NeMo 1 `.nemo`, packed or unpacked, or a NeMo 2 directory, in any layout that divides the
    model) or, with random weights, from a configuration in NeMo 1's names. `policy` makes what the trainer works on.

    gpt: this process's part of the model. architecture: independent of the layout. tokenizer: the checkpoint's, or the
    one that `tokenizer` in an overriding configuration names.
    """

    def __init__(self, cfg: DictConfig, trainer: Any = None) -> None:
        """cfg: the `model` section: `tensor_model_parallel_size`, `pipeline_model_parallel_size`, `sequence_parallel`,
        `precision`, `seed`, `activations_checkpoint_*`; without a checkpoint also the architecture and the tokenizer.

        The process groups, where there are none yet, are made for the layout in cfg.
        """
        folder = being_restored_from(type(self))
        super().__init__(cfg=cfg, trainer=trainer)
        cfg = self._cfg
        if not setup.is_initialized():
            setup.initialize(
                cfg.get("tensor_model_parallel_size", 1),
                cfg.get("pipeline_model_parallel_size", 1),
                cfg.get("seed", 1234),
            )
        self.precision = "bf16" if "bf16" in str(cfg.get("precision")) else "32"
        if folder is None:
            self._build_from_config()
        else:
            self._build_from_checkpoint(folder)
            after_restoring(folder)

    def _build_from_checkpoint(self, path: str) -> None:
        with open_checkpoint(path) as source:
            self.tokenizer = restore_tokenizer(source, self._cfg.get("tokenizer"))
            self._build(source.architecture(self.tokenizer.vocab_size), path)
            load_weights(self.gpt, source.weights(), str(source.path))

    def _build_from_config(self) -> None:
        config = OmegaConf.to_container(self._cfg, resolve=True)
        self.tokenizer = build_tokenizer(from_nemo1(config, "model.tokenizer"))
        multiple = config.get("make_vocab_size_divisible_by") or 128
        rows = -(-self.tokenizer.vocab_size // multiple) * multiple
        embedding = {EMBEDDING: StoredTensor((rows, config["hidden_size"]), torch.float32)}
        self._build(architecture_from_nemo1(config, embedding, self.tokenizer.vocab_size, "model"), "model")

    def _build(self, architecture: Architecture, origin: str) -> None:
        self.architecture = architecture
        check_tokenizer_fits(self.tokenizer, architecture.vocab_rows, origin)
        self.sequence_parallel = bool(self._cfg.get("sequence_parallel", False))
        check_layout(architecture, *setup.layout(), self.sequence_parallel)
        recompute = RecomputeConfig(
            granularity=self._cfg.get("activations_checkpoint_granularity"),
            method=self._cfg.get("activations_checkpoint_method"),
            num_layers=self._cfg.get("activations_checkpoint_num_layers"),
        )
        self.gpt = build_gpt(architecture, self.precision, self.sequence_parallel, recompute)

    # ------------------------------------------------------------------------------------------ for any use

    def generator(
        self,
        sampling: SamplingParams,
        min_length: int,
        stop_ids: frozenset[int],
        seed: int,
        slots: int | None,
        context_length: int,
        kv_cache_gib: float | None = None,
        engine: str = "auto",
    ) -> Engine:
        """What makes responses with the weights that the model has then; see `Generator` for the numbers.

        stop_ids: the ids at which a response ends, beside the end strings of `sampling`: one that is a single token
        joins them, the others are looked for in the text.
        """
        ids = {text: self.tokenizer.id_of(text) for text in sampling.end_strings}
        in_text = [text for text, token in ids.items() if token is None]
        return make_engine(
            engine,
            self.gpt,
            vocab_size=min(self.tokenizer.vocab_size, self.architecture.vocab_size),
            max_sequence_length=context_length,
            sampling=sampling,
            min_length=min_length,
            stop_ids=stop_ids | {token for token in ids.values() if token is not None},
            seed=seed,
            slots=slots,
            pad_id=self.tokenizer.pad_id,
            should_stop=ends_with_any(in_text, self.tokenizer) if in_text else None,
            kv_cache_gib=kv_cache_gib,
        )

    def batching(
        self, micro_batch_size: int, micro_batch_tokens: int | None = None, packed: bool | None = None
    ) -> Batching:
        """How sequences become tensors for this model; the arguments as in `Batching`."""
        tensor_model_parallel_size, _ = setup.layout()
        return Batching(
            vocab_size=self.architecture.vocab_size,
            pad_id=self.tokenizer.pad_id,
            micro_batch_size=micro_batch_size,
            multiple_of=tensor_model_parallel_size if self.sequence_parallel else 1,
            micro_batch_tokens=micro_batch_tokens,
            packed=packed,
        )

    # ------------------------------------------------------------------------------------------ training

    def policy(self, cfg: SpinConfig, context_length: int, stop_ids: frozenset[int]) -> MegatronPolicy:
        """This model in self-play: with an optimizer, a reference, and an engine for rollouts.

        context_length: most tokens of prompt and response. stop_ids: the ids at which a generated response ends, beside
        `end_strings`.
        """
        at_a_time = cfg.micro_batch_tokens, cfg.packed_sequence
        return MegatronPolicy(
            self.gpt,
            self.tokenizer,
            cfg,
            engine=self.generator(
                cfg.spin.sampling_params,
                min_length=cfg.spin.length_params.min_length,
                stop_ids=stop_ids,
                seed=cfg.seed,
                slots=cfg.spin.rollout_batch_size,
                context_length=context_length,
                kv_cache_gib=cfg.spin.kv_cache_gib,
                engine=cfg.spin.generation_engine,
            ),
            train_batching=self.batching(cfg.micro_batch_size, *at_a_time),
            score_batching=self.batching(cfg.spin.log_prob_forward_micro_batch_size, *at_a_time),
            max_new_tokens=cfg.spin.length_params.max_length or context_length,
        )

    # ------------------------------------------------------------------------------------------ saving and restoring

    def content(self) -> Content:
        """What `export.export` writes, in any format; every process calls that."""
        own = {key: self._cfg[key] for key in ("target", "nemo_version", "spin", "optim", "seed") if key in self._cfg}
        return Content(
            self.architecture,
            LiveWeights(self.gpt, self.architecture),
            self.tokenizer,
            nemo_config=OmegaConf.to_container(OmegaConf.create(own), resolve=True),
        )

    @classmethod
    def restore_from(cls, restore_path: str, *args: Any, save_restore_connector: Any = None, **kwargs: Any) -> Any:
        """As ModelPT.restore_from. `override_config_path` (a configuration or a file) is laid over the checkpoint's own
        configuration; its layout, precision and tokenizer count, the architecture comes from the checkpoint.

        Raises CheckpointError or ConfigError in one sentence for what cannot be restored.
        """
        connector = save_restore_connector or SPINSaveRestoreConnector()
        check_before_restoring(restore_path, connector)
        return super().restore_from(restore_path, *args, save_restore_connector=connector, **kwargs)

    def save_to(self, save_path: str | Path) -> None:
        """Write a `.nemo` (NeMo 1's layout, torch_dist weights); every process calls it.

        It becomes visible when it is whole. Raises UserError if it cannot be written.
        """
        SPINSaveRestoreConnector().save_to(self, str(Path(save_path).expanduser().resolve()))

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Empty: no process has all weights. `save_to` and the training checkpoints write them sharded."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True) -> None:  # type: ignore[override]
        """Accepts the empty state_dict that a `.nemo` of this class holds beside its sharded weights."""
        if state_dict:
            raise UserError(
                "A MegatronGPTSPINModel takes no plain state_dict: its weights are sharded; use restore_from."
            )

    # ------------------------------------------------------------------------------------------ ModelPT

    def setup_training_data(self, train_data_config: Any) -> None:
        """Data belong to the trainer; NeMo asks every model for this method."""

    def setup_validation_data(self, val_data_config: Any) -> None:
        """Data belong to the trainer; NeMo asks every model for this method."""

    @classmethod
    def list_available_models(cls) -> list[Any]:
        """None: start from your own SFT checkpoint."""
        return []
