"""The configuration of a run as frozen dataclasses, whose fields declare its keys: see `settings`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_spin.config.algorithm import AlgorithmConfig
from nemo_spin.config.dataset import DatasetConfig, TokenizerConfig, ValidationConfig
from nemo_spin.config.settings import REQUIRED, section, setting
from nemo_spin.config.values import numbers

# metric of a validation -> what is best
MONITORS = {"val_loss": "min", "val/loss": "min", "val/rewards/margins": "max", "val/rewards/accuracies": "max"}
PRECISIONS = {"bf16": "bf16", "bf16-mixed": "bf16", "32": "32", "32-true": "32", "fp32": "32"}
# the loggers of exp_manager that are offered, each with a switch create_*_logger
LOGGERS = ("tensorboard", "wandb", "mlflow")
# More is a mistake, and would make lists of betas and learning rates that fill the memory.
MAX_ITERATIONS = 10_000


def _seconds(value: Any) -> float:
    """NeMo's DD:HH:MM:SS in seconds."""
    parts = str(value).split(":")
    if len(parts) != 4 or not all(re.fullmatch(r"[0-9]{1,9}", part) for part in parts) or not any(map(int, parts)):
        raise ValueError('use DD:HH:MM:SS in quotes, such as "00:03:45:00" for 3 hours and 45 minutes')
    days, hours, minutes, seconds = map(int, parts)
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def _precision(value: Any) -> str:
    if isinstance(value, bool) or str(value) not in PRECISIONS:
        raise ValueError("use bf16, bf16-mixed, 32, 32-true or fp32")
    return PRECISIONS[str(value)]


def _betas(value: Any) -> tuple[float, ...]:
    betas = numbers(value)
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError("use two numbers from 0 to below 1, such as [0.9, 0.98]")
    return betas


@dataclass(frozen=True, slots=True)
class EquilibriumConfig:
    """`trainer.spin.stop_at_equilibrium`: a run ends before an iteration in which every limit that is given is met."""

    accuracy: float | None = setting(None, minimum=0.5, maximum=1.0)
    """SPIN's accuracy on held-out pairs in the iteration before, at most (0.5: it cannot tell human from generated;
    0.55 is a start); null: not asked"""
    logps_gap: float | None = setting(None, above=0.0)
    """the reference's log-probability of generated against human responses: this far apart at most, in nats per token;
    null: not asked"""
    exact_match: float | None = setting(None, above=0.0, maximum=1.0)
    """share of generated responses that are the human one, at least; null: not asked"""
    token_overlap: float | None = setting(None, above=0.0, maximum=1.0)
    """overlap of generated and human responses (F1 of their tokens), at least; null: not asked"""

    @property
    def is_asked_for(self) -> bool:
        return any(limit is not None for limit in (self.accuracy, self.logps_gap, self.exact_match, self.token_overlap))


@dataclass(frozen=True, slots=True)
class LoopConfig:
    """`trainer.spin`: how long the run is, and what happens when. Of max_epochs there are as many as iterations."""

    max_iterations: int = setting(1, minimum=1, maximum=MAX_ITERATIONS)
    """rounds of self-play (T in the paper); after each the policy becomes the reference"""
    max_epochs: tuple[int, ...] = setting((1,), minimum=1, per_iteration=True)
    """passes over the training data in each iteration (the paper: 2): one number, or a list with one per iteration"""
    max_steps: int = setting(-1, minimum=-1)
    """steps of the whole run, over all iterations; -1: no limit"""
    val_check_interval: int | float = setting(0, counts="steps")
    """validate every so many steps (whole number) or this fraction of an epoch (0.0 to 1.0) within an iteration; 0:
    only at the start of the run and the end of each iteration"""
    save_interval: int = setting(100, minimum=-1)
    """steps between checkpoints within an iteration; 0: only at the end of each iteration"""
    limit_train_batches: int | float = setting(1.0, minimum=1, counts="batches")
    """batches of an epoch that are used: a number (10) or a fraction (1.0: all)"""
    limit_val_batches: int | float = setting(1.0, counts="batches")
    """batches of a validation that are used: a number or a fraction; 0: no validation"""
    gradient_clip_val: float = setting(1.0, minimum=0.0)
    """largest 2-norm of the gradient, over all parameters; 0: no clipping"""
    max_seconds: float | None = setting(None, name="exp_manager.max_time_per_run", read=_seconds, words="text")
    """after so much time the run saves and ends by itself, "DD:HH:MM:SS"; null: no limit"""
    log_samples: int = setting(3, minimum=0)
    """generated responses shown beside the human ones in each iteration; 0: none"""
    max_skipped_steps: int = setting(3, minimum=0)
    """steps in a row that may be skipped because the loss or the gradient is NaN or infinite; one more ends the run
    with a report; 0: the first one does"""
    hang_timeout: float = setting(1800, minimum=0.0)
    """seconds without progress of any process after which the run ends, and says where each of them is; longer than
    reading or writing a checkpoint takes; 0: never"""
    stop_at_equilibrium: EquilibriumConfig = section(
        "trainer.spin.stop_at_equilibrium", default_factory=EquilibriumConfig
    )
    """ends the run before an iteration where all limits that are given are met, measured on held_out_rollouts: the
    model is then hard to tell from the data"""


@dataclass(frozen=True, slots=True)
class ParallelConfig:
    """Processes, and how the model lies over them.

    sequence_parallel is False when tensor_model_parallel_size is 1, where Megatron ignores it as well.
    """

    num_nodes: int = setting(1, minimum=1)
    """machines; with more than one, start the processes with torchrun or srun"""
    devices: int = setting(1, minimum=1)
    """processes on each machine, one per GPU; started for you on a single machine"""
    tensor_model_parallel_size: int = setting(1, name="model.tensor_model_parallel_size", null=1, minimum=1)
    """processes that share each layer; null: as the checkpoint was trained, 1 where it does not say"""
    pipeline_model_parallel_size: int = setting(1, name="model.pipeline_model_parallel_size", null=1, minimum=1)
    """stages that the layers are divided into; the processes left are data parallel; null: as the checkpoint was
    trained"""
    sequence_parallel: bool = setting(False, name="model.sequence_parallel")
    """split activations outside of attention and MLP between tensor-parallel processes as well; no effect with one"""
    accelerator: str = setting("auto", choices=("auto", "gpu", "cpu"))
    """gpu, cpu, or auto: GPUs when there are any"""

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.devices

    @property
    def data_parallel_size(self) -> int:
        return self.world_size // (self.tensor_model_parallel_size * self.pipeline_model_parallel_size)

    def __str__(self) -> str:
        sizes = (
            f"{self.tensor_model_parallel_size} x PP {self.pipeline_model_parallel_size} x DP {self.data_parallel_size}"
        )
        return f"TP {sizes}" + (", sequence parallel" if self.sequence_parallel else "")


@dataclass(frozen=True, slots=True)
class SchedConfig:
    """`model.optim.sched`: the learning rate over the steps of an iteration (of the run if the optimizer is kept)."""

    name: str = setting("CosineAnnealing", choices=("CosineAnnealing", "LinearAnnealing", "Constant"))
    """CosineAnnealing, LinearAnnealing or Constant, after a linear warm-up"""
    warmup_steps: int = setting(10, minimum=0)
    """steps until the learning rate has risen to its peak"""
    constant_steps: int = setting(0, minimum=0)
    """steps at min_lr at the end"""
    min_lr: float = setting(1e-7, minimum=0.0)
    """where the decay ends, at most the smallest learning rate"""


@dataclass(frozen=True, slots=True)
class OptimConfig:
    """`model.optim`: Adam with decoupled weight decay, or RMSProp. Of lr there are as many numbers as iterations."""

    name: str = setting(
        "distributed_fused_adam",
        choices=("adam", "adamw", "fused_adam", "distributed_fused_adam", "mcore_distributed_optim", "rmsprop"),
    )
    """distributed_*: state sharded over data parallelism; or adam, adamw, fused_adam; or rmsprop (torch's; the paper's,
    with weight_decay 0), whose state is not sharded"""
    lr: tuple[float, ...] = setting((5e-7,), null=REQUIRED, above=0.0, per_iteration=True)
    """peak learning rate: one number, or a list with one per iteration"""
    weight_decay: float = setting(0.1, minimum=0.0)
    """share of a weight that a step takes away, times the learning rate"""
    betas: tuple[float, float] = setting((0.9, 0.98), read=_betas, words="list of numbers")
    """Adam's decay rates of the gradient's mean and of its square"""
    eps: float = setting(1e-8, above=0.0)
    """added to the root of the squares' mean"""
    sched: SchedConfig = section("model.optim.sched", default_factory=SchedConfig)
    """over the steps of an iteration (of the run, if the optimizer is not reset)"""
    alpha: float = setting(0.99, minimum=0.0, below=1.0)
    """RMSProp's decay rate of the gradient's square"""

    @property
    def is_rmsprop(self) -> bool:
        return self.name == "rmsprop"

    @property
    def distributed(self) -> bool:
        return "distributed" in self.name


@dataclass(frozen=True, slots=True)
class RecomputeConfig:
    """`model.activations_checkpoint_*`: activations that are computed again in the backward pass, to save memory.

    method and num_layers are None unless granularity is "full".
    """

    granularity: str | None = setting(
        None, name="model.activations_checkpoint_granularity", choices=("selective", "full")
    )
    """activations computed again in the backward pass, to save memory; null: none; selective: attention; full: whole
    layers"""
    method: str | None = setting(None, name="model.activations_checkpoint_method", choices=("uniform", "block"))
    """for full: uniform (groups of layers; so is null) or block (the first layers of a stage)"""
    num_layers: int | None = setting(None, name="model.activations_checkpoint_num_layers", minimum=1)
    """for full: layers in a group, or layers of each stage; null: 1"""


@dataclass(frozen=True, slots=True)
class CheckpointConfig:
    """`exp_manager.checkpoint_callback_params`: which checkpoints stay, and what is written at the end."""

    monitor: str = setting("val_loss", choices=(*MONITORS,))
    """metric by which checkpoints are best: val_loss, val/loss, val/rewards/margins, val/rewards/accuracies"""
    mode: str = setting(None, null="min", choices=("min", "max"))
    """whether min or max of it is best; null: what suits it"""
    save_top_k: int = setting(0, minimum=-1)
    """so many of the best within iterations stay as well; -1: all"""
    async_save: bool = setting(True)
    """write while training goes on, from a copy in host memory; false: wait for the disk"""
    save_best_model: bool = setting(False)
    """what is written at the end: the weights of the best checkpoint, by monitor; false: the last ones"""
    save_nemo_on_train_end: bool = setting(True)
    """write the trained policy as a .nemo at the end"""
    save_nemo2_on_train_end: bool = setting(False)
    """write it as a NeMo 2 directory"""
    save_megatron_on_train_end: bool = setting(False)
    """write it as a directory of Megatron-LM and Megatron-Bridge (torch_dist)"""
    save_hf_on_train_end: bool = setting(False)
    """write it as a Hugging Face directory (safetensors)"""

    @property
    def formats_on_train_end(self) -> list[str]:
        """The formats, as `nemo-spin convert` calls them, that the trained policy is written in."""
        wanted = {
            "nemo": self.save_nemo_on_train_end,
            "nemo2": self.save_nemo2_on_train_end,
            "megatron": self.save_megatron_on_train_end,
            "hf": self.save_hf_on_train_end,
        }
        return [file_format for file_format, is_wanted in wanted.items() if is_wanted]


@dataclass(frozen=True, slots=True)
class ExperimentConfig:
    """`exp_manager`: where the run writes, what it goes on from, and its loggers."""

    explicit_log_dir: str | None = setting(None)
    """directory of the run: checkpoints, rollouts, logs and the final .nemo; null: exp_dir/name"""
    exp_dir: str | None = setting(None)
    """with explicit_log_dir null: the run goes to exp_dir/name; null: nemo_experiments"""
    name: str = setting("megatron_gpt_spin")
    """name of the experiment"""
    create_tensorboard_logger: bool = setting(True)
    """events for TensorBoard in the directory of the run"""
    summary_writer_kwargs: Mapping[str, Any] | None = setting(None)
    """for TensorBoard's writer"""
    create_wandb_logger: bool = setting(False)
    """log to Weights & Biases"""
    wandb_logger_kwargs: Mapping[str, Any] | None = setting({"project": "nemo_spin", "name": "megatron_gpt_spin"})
    """used when create_wandb_logger is true"""
    create_mlflow_logger: bool = setting(False)
    """log to MLflow"""
    mlflow_logger_kwargs: Mapping[str, Any] | None = setting({"experiment_name": "nemo_spin", "tracking_uri": None})
    """used when create_mlflow_logger is true; tracking_uri null: MLFLOW_TRACKING_URI, or the directory of the run"""
    resume_if_exists: bool = setting(True)
    """resume from the last checkpoint in the directory of the run"""
    resume_ignore_no_checkpoint: bool = setting(True)
    """start anew when there is none; false: that is an error"""
    files_to_copy: tuple[str, ...] = setting(())
    """files that NeMo's exp_manager copies into the directory of the run"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpinConfig:
    """A whole run. tokenizer: None for the checkpoint's own. validation_ds: None for no validation."""

    parallel: ParallelConfig = section("trainer")
    precision: str = setting("bf16", name="trainer.precision", read=_precision, words="text or whole number")
    """bf16 (the same as bf16-mixed; main parameters in fp32) or 32 (the same as 32-true, fp32)"""
    experiment: ExperimentConfig = section("exp_manager")
    checkpoint: CheckpointConfig = section("exp_manager.checkpoint_callback_params")
    """the newest checkpoint and the last of every iteration stay in any case"""
    loop: LoopConfig = section("trainer.spin")
    restore_from_path: str = setting(REQUIRED, name="pretrained_checkpoint.restore_from_path")
    """the SFT model: a checkpoint of NeMo, Megatron or Hugging Face, or a run's directory"""
    micro_batch_size: int = setting(1, name="model.micro_batch_size", minimum=1)
    """pairs in a forward pass of a data-parallel rank: more is faster and takes more memory"""
    micro_batch_tokens: int | None = setting(None, name="model.micro_batch_tokens", minimum=1)
    """alternative to micro_batch_size: token budget per forward pass (training and reference log-probabilities); a pair
    above the budget runs alone"""
    packed_sequence: bool | None = setting(None, name="model.packed_sequence")
    """sequences one behind the other in place of padding; null: packed, but padded with TransformerEngine"""
    global_batch_size: int = setting(64, name="model.global_batch_size", null=REQUIRED, minimum=1)
    """pairs in an optimizer step; a multiple of micro_batch_size x data-parallel size"""
    encoder_seq_length: int | None = setting(None, name="model.encoder_seq_length", minimum=2)
    """longest sequence in tokens; null: the checkpoint's"""
    seed: int = setting(1234, name="model.seed", minimum=0)
    """of the data order and of every generated response"""
    recompute: RecomputeConfig = section("model")
    """The architecture and the tokenizer come from the checkpoint, whatever layout it was saved with."""
    tokenizer: TokenizerConfig | None = section("model.tokenizer", given_by=("library", "type", "model"))
    """replaces the checkpoint's own, for example when it cannot be found any more"""
    spin: AlgorithmConfig = section("model.spin")
    optim: OptimConfig = section("model.optim")
    """Adam with decoupled weight decay, or RMSProp"""
    train_ds: DatasetConfig = section("model.data.train_ds")
    """Files: JSONL (also compressed: gzip, bzip2, xz, zstandard), parquet, or a directory of datasets.save_to_disk.
    Records: {"input": ..., "output": ...}, {"messages": [...]} in OpenAI's form, {"conversations": [...]} in NeMo's,
    {"real": [messages], "generated": [messages]}, {"prompt_ids": [...], "response_ids": [...]}; mixed if you like."""
    validation_ds: ValidationConfig | None = section(
        "model.data.validation_ds", like="model.data.train_ds", given_by=("file_path",), without="no validation"
    )
