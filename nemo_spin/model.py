"""The SPIN model as NeMo sees it: a ModelPT that owns the GPT, its optimizer and its reference.

It registers the package with NeMo, so that NeMo restores archives that name this class.
"""

from __future__ import annotations

import resource
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from nemo.core.classes import ModelPT
from nemo.core.classes import common as nemo_common
from nemo.utils.app_state import AppState
from omegaconf import DictConfig, OmegaConf

from nemo_spin.config import RecomputeConfig, SamplingParams, SpinConfig
from nemo_spin.data.example import Example
from nemo_spin.errors import UserError
from nemo_spin.generation.choose import make_engine
from nemo_spin.generation.end_strings import ends_with_any
from nemo_spin.generation.interface import Engine, Response
from nemo_spin.megatron import setup, steps
from nemo_spin.megatron.architecture import Architecture, check_layout
from nemo_spin.megatron.gpt import build_gpt
from nemo_spin.megatron.optimizer import Optimizer
from nemo_spin.megatron.steps import Batching
from nemo_spin.model_io.export import Content, LiveWeights
from nemo_spin.model_io.nemo1.config import architecture_from_nemo1
from nemo_spin.model_io.nemo_connector import (
    SPINSaveRestoreConnector,
    by_own_connector,
    check_before_nemo,
    check_before_restoring,
)
from nemo_spin.model_io.open import open_checkpoint
from nemo_spin.model_io.stores.interface import EMBEDDING, StoredTensor
from nemo_spin.model_io.tokenizers import build_tokenizer, check_tokenizer_fits, restore_tokenizer
from nemo_spin.model_io.tokenizers.description import from_nemo1
from nemo_spin.model_io.weights import load_weights
from nemo_spin.selfplay.non_finite import Diagnosis, diagnose
from nemo_spin.selfplay.pairs import Pair, group_of_example, trainable
from nemo_spin.selfplay.reference import Reference
from nemo_spin.selfplay.rollouts.roll_out import RolloutRequest, RolloutResult, roll_out
from nemo_spin.selfplay.step import spin_metrics_of, spin_step

if "nemo_spin." not in nemo_common.ALLOWED_TARGET_PREFIXES:
    nemo_common.ALLOWED_TARGET_PREFIXES.append("nemo_spin.")


class MegatronGPTSPINModel(ModelPT):
    """A GPT in its parallel layout, with what SPIN does to it.

    Made by `restore_from` (a NeMo 1 `.nemo`, packed or unpacked, or a NeMo 2 directory, in any layout that divides the
    model) or, with random weights, from a configuration in NeMo 1's names. For training, call `prepare_training`.

    gpt: this process's part of the model. architecture: independent of the layout. tokenizer: the checkpoint's, or the
    one that `tokenizer` in an overriding configuration names.
    """

    def __init__(self, cfg: DictConfig, trainer: Any = None) -> None:
        """cfg: the `model` section: `tensor_model_parallel_size`, `pipeline_model_parallel_size`, `sequence_parallel`,
        `precision`, `seed`, `activations_checkpoint_*`; without a checkpoint also the architecture and the tokenizer.

        The process groups, where there are none yet, are made for the layout in cfg.
        """
        if self._is_model_being_restored() and not by_own_connector.get():
            check_before_nemo(AppState().nemo_file_folder)
        super().__init__(cfg=cfg, trainer=trainer)
        cfg = self._cfg
        if not setup.is_initialized():
            setup.initialize(
                cfg.get("tensor_model_parallel_size", 1),
                cfg.get("pipeline_model_parallel_size", 1),
                cfg.get("seed", 1234),
            )
        self.precision = "bf16" if "bf16" in str(cfg.get("precision")) else "32"
        if self._is_model_being_restored():
            folder = AppState().nemo_file_folder
            self._build_from_checkpoint(folder)
            if not by_own_connector.get():
                # NeMo's connector unpacked the archive into this folder of its own, and loads a state_dict from it.
                # It is not in the archive: NeMo 1 would take it for the weights, and not look at model_weights/.
                torch.save({}, Path(folder) / "model_weights.ckpt")
        else:
            self._build_from_config()
        self.optimizer: Optimizer | None = None
        self.reference: Reference | None = None

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

    def prepare_training(self, cfg: SpinConfig, context_length: int, stop_ids: frozenset[int]) -> None:
        """Make optimizer and reference.

        context_length: most tokens of prompt and response. stop_ids: the ids at which a generated response ends, beside
        `end_strings`.
        """
        self._context_length = context_length
        self._loss = cfg.spin.loss
        at_a_time = cfg.micro_batch_tokens, cfg.packed_sequence
        self._train_batching = self.batching(cfg.micro_batch_size, *at_a_time)
        self._score_batching = self.batching(cfg.spin.log_prob_forward_micro_batch_size, *at_a_time)
        self._max_new_tokens = cfg.spin.length_params.max_length or context_length
        self._temperature = cfg.spin.temperature
        self.optimizer = Optimizer(self.gpt, cfg.optim, cfg.loop.gradient_clip_val)
        self.reference = Reference(self.gpt, keep_copy=cfg.spin.keeps_reference)
        self._generator = self.generator(
            cfg.spin.sampling_params,
            min_length=cfg.spin.length_params.min_length,
            stop_ids=stop_ids,
            seed=cfg.seed,
            slots=cfg.spin.rollout_batch_size,
            context_length=context_length,
            kv_cache_gib=cfg.spin.kv_cache_gib,
            engine=cfg.spin.generation_engine,
        )

    def start_schedule(self, lr: float, total_steps: int, steps_done: int, fresh: bool) -> None:
        """Begin, or go on with, a learning-rate schedule; `fresh` forgets Adam's moments."""
        self.optimizer.start(lr, total_steps, steps_done, fresh)

    def train_step(self, pairs: Sequence[Pair], beta: float) -> dict[str, float]:
        """One optimizer step on the `trainable` pairs of a global batch; their metrics, as `spin_step` says them."""
        metrics = spin_step(self.optimizer, trainable(pairs), beta, self._train_batching, self._loss)
        if not metrics["skipped"]:
            self.reference.policy_moved()
        return metrics

    def diagnose(self, pairs: Sequence[Pair]) -> Diagnosis:
        """What is not finite after a `train_step` that was skipped, on the pairs that it was made on."""
        return diagnose(self.gpt, pairs, self._train_batching)

    def validation_step(self, examples: Sequence[Example]) -> tuple[float, int]:  # type: ignore[override]
        """(summed NLL in nats, number) of the response tokens of a global batch."""
        return steps.sft_nll(self.gpt, [group_of_example(e) for e in examples], self._train_batching)

    def spin_validation_step(self, pairs: Sequence[Pair], beta: float) -> dict[str, float]:
        """SPIN's metrics of a global batch of held-out pairs, summed over them."""
        return spin_metrics_of(self.gpt, pairs, beta, self._train_batching, self._loss)

    def peak_memory(self) -> int:
        """Bytes: the most that this process has held so far, on the GPU, or resident on the CPU."""
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def rollout_settings(self, iteration: int) -> dict[str, Any]:
        """What the rollouts of an iteration depend on beside weights and prompts, as JSON has it."""
        return {
            "precision": self.precision,
            "max_new_tokens": self._max_new_tokens,
            **self._generator.settings,
            # A run that has ended stands at the start of an iteration that it does not have.
            "temperature": self._temperature[min(iteration, len(self._temperature) - 1)],
        }

    def roll_out(self, request: RolloutRequest) -> RolloutResult:
        """Generate responses with the reference, at the iteration's temperature, and score them; see `roll_out`."""
        self._generator.temperature = self._temperature[request.iteration]
        with self.reference.swapped_in():
            return roll_out(self.gpt, self._generator, request, self._max_new_tokens, self._score_batching)

    def given_response(self, index: int, ids: Sequence[int]) -> Response:
        """A response that the data contain, in place of one that the reference generates. ids: at least one."""
        return Response(index, array("i", ids), "stop" if ids[-1] in self._generator.stop_ids else "length")

    def refresh_reference(self) -> str:
        """The policy becomes the reference. Returns a name of its weights; see `Reference.name`."""
        self.reference.refresh()
        return self.reference.name()

    # ------------------------------------------------------------------------------------------ saving and restoring

    @property
    def reference_is_needed(self) -> bool:
        """Whether a checkpoint has to hold the reference: it differs from the policy and may be swapped in again."""
        return self.reference.is_away

    def sharded_training_state(self, with_reference: bool, is_loading: bool) -> dict[str, Any]:
        """Policy, optimizer and, if asked for, reference, as megatron-core shards them."""
        policy = _without_extra_state(self.gpt.sharded_state_dict())
        state = {"policy": policy, "optimizer": self.optimizer.sharded_state_dict(policy, is_loading)}
        if with_reference:
            prefix = "ref_policy."
            state["ref_policy"] = _without_extra_state(self.gpt.sharded_state_dict(prefix=prefix))
            for name, shard in state["ref_policy"].items():
                shard.data = self.reference.weights[name.removeprefix(prefix)]
        return state

    def load_training_state(self, state: dict[str, Any], mid_iteration: bool) -> None:
        """The inverse of `sharded_training_state`. mid_iteration: the policy has moved away from its reference."""
        self.gpt.load_state_dict(state["policy"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        if "ref_policy" in state:
            self.reference.load({name.removeprefix("ref_policy."): t for name, t in state["ref_policy"].items()})
        else:
            self.reference.refresh()
        if mid_iteration or "ref_policy" in state:
            self.reference.policy_moved()

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


def _without_extra_state(state: dict[str, Any]) -> dict[str, Any]:
    """TransformerEngine keeps fp8 statistics there, which belong to a layout and are not used."""
    return {name: shard for name, shard in state.items() if not name.endswith("_extra_state")}
