"""The configuration of a run as frozen dataclasses: names, units and ranges. Defaults lie in conf/gpt_spin.yaml."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_spin.config.algorithm import AlgorithmConfig
from nemo_spin.config.dataset import DatasetConfig, TokenizerConfig

# More is a mistake, and would make lists of betas and learning rates that fill the memory.
MAX_ITERATIONS = 10_000


@dataclass(frozen=True, slots=True)
class EquilibriumConfig:
    """`trainer.spin.stop_at_equilibrium`: a run ends before an iteration in which every limit that is given is met.

    accuracy: in [0.5, 1]; that of SPIN's margin on held-out rollouts, in the iteration before, is at most this.
    logps_gap: nats per response token, above 0; the reference's mean log-probability of a token of its own responses
        is at most so far from that of a human one.
    exact_match, token_overlap: in (0, 1]; of held-out responses, generated beside human, at least this.
    """

    accuracy: float | None
    logps_gap: float | None
    exact_match: float | None
    token_overlap: float | None

    @property
    def is_asked_for(self) -> bool:
        return any(limit is not None for limit in (self.accuracy, self.logps_gap, self.exact_match, self.token_overlap))


@dataclass(frozen=True, slots=True)
class LoopConfig:
    """`trainer.spin`: how long the run is, and what happens when.

    max_iterations: rounds of self-play, 1 to `MAX_ITERATIONS`.
    max_epochs: passes over the training data in each iteration, >= 1; as many numbers as there are iterations.
    max_steps: optimizer steps of the whole run, over all iterations; -1 for no limit.
    val_check_interval: optimizer steps (int) or fraction of an epoch (float in (0, 1]) between validations within an
        iteration; 0 for none but those at the run's start and each iteration's end.
    save_interval: optimizer steps between checkpoints within an iteration; 0 or below for none but those at each
        iteration's end.
    limit_train_batches, limit_val_batches: global batches of an epoch or a validation that are used: a number (int) or
        a fraction (float in (0, 1]); 0 validation batches switch validation off.
    gradient_clip_val: largest 2-norm of the gradient, over all parameters; 0 for no clipping.
    max_seconds: after so many the run saves and ends; None for no limit (`exp_manager.max_time_per_run`).
    log_samples: generated responses that are shown beside the human ones in each iteration.
    max_skipped_steps: steps in a row that may be skipped because loss or gradient are not finite; one more is the end.
    hang_timeout: seconds without progress of any process after which the run ends; 0 for never.
    """

    max_iterations: int
    max_epochs: tuple[int, ...]
    max_steps: int
    val_check_interval: int | float
    save_interval: int
    limit_train_batches: int | float
    limit_val_batches: int | float
    gradient_clip_val: float
    max_seconds: float | None
    log_samples: int
    max_skipped_steps: int
    hang_timeout: float
    stop_at_equilibrium: EquilibriumConfig


@dataclass(frozen=True, slots=True)
class ParallelConfig:
    """Processes, and how the model lies over them.

    num_nodes, devices: machines, and processes on each of them.
    tensor_model_parallel_size, pipeline_model_parallel_size: processes that share a layer, and stages of layers.
    sequence_parallel: split activations outside of attention and MLP over the tensor-parallel group. False when
        tensor_model_parallel_size is 1, where Megatron ignores it as well.
    accelerator: "auto" (GPUs when there are any), "gpu" or "cpu".
    """

    num_nodes: int
    devices: int
    tensor_model_parallel_size: int
    pipeline_model_parallel_size: int
    sequence_parallel: bool
    accelerator: str

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
    """`model.optim.sched`: the learning rate over the steps of an iteration (of the run if the optimizer is kept).

    name: "CosineAnnealing", "LinearAnnealing" or "Constant", after a linear warm-up.
    warmup_steps: steps until the learning rate has risen to its peak.
    constant_steps: steps at `min_lr` at the end.
    min_lr: where the decay ends, at most the smallest learning rate.
    """

    name: str
    warmup_steps: int
    constant_steps: int
    min_lr: float


@dataclass(frozen=True, slots=True)
class OptimConfig:
    """`model.optim`: Adam with decoupled weight decay, whatever its name, or RMSProp.

    name: a name that begins with "distributed" (or mcore_distributed_optim) shards its state over data parallelism;
        "rmsprop" is torch's, whose state is not sharded.
    lr: peak learning rate of each iteration, > 0; as many as there are iterations.
    weight_decay: >= 0, 0 for RMSProp. betas: of Adam, in [0, 1). alpha: RMSProp's decay rate, in [0, 1). eps: > 0.
    """

    name: str
    lr: tuple[float, ...]
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    sched: SchedConfig
    alpha: float = 0.99

    @property
    def is_rmsprop(self) -> bool:
        return self.name == "rmsprop"

    @property
    def distributed(self) -> bool:
        return "distributed" in self.name


@dataclass(frozen=True, slots=True)
class RecomputeConfig:
    """`model.activations_checkpoint_*`: activations that are computed again in the backward pass.

    granularity: None, "selective" (attention) or "full" (layers).
    method, num_layers: for "full" only, else None: "uniform" groups of num_layers layers, or the first num_layers of
        each stage ("block").
    """

    granularity: str | None
    method: str | None
    num_layers: int | None


@dataclass(frozen=True, slots=True)
class CheckpointConfig:
    """`exp_manager.checkpoint_callback_params`: which checkpoints stay, and what is written at the end.

    monitor, mode: metric by which checkpoints are best, and whether "min" or "max" of it is.
    save_top_k: so many of the best within iterations stay, beside the newest and each iteration's last; -1 for all.
    async_save: training goes on while checkpoints are written, from a copy in host memory.
    save_best_model: what is written at the end are the weights of the best checkpoint by `monitor`, not the last ones.
    save_nemo_on_train_end, save_nemo2_on_train_end, save_megatron_on_train_end, save_hf_on_train_end: write the trained
        policy as a `.nemo`, a NeMo 2 directory, a Megatron torch_dist directory, a Hugging Face directory.
    """

    monitor: str
    mode: str
    save_top_k: int
    async_save: bool
    save_best_model: bool
    save_nemo_on_train_end: bool
    save_nemo2_on_train_end: bool
    save_megatron_on_train_end: bool
    save_hf_on_train_end: bool

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
class SpinConfig:
    """A whole run.

    micro_batch_size, global_batch_size: pairs per forward pass of a data-parallel rank, and per optimizer step.
    micro_batch_tokens: most tokens per forward pass in place of micro_batch_size and log_prob_forward_micro_batch_size;
        a pair with more goes alone. None for those.
    packed_sequence: whether sequences lie one behind the other in place of padding; None to choose, see `Batching`.
    encoder_seq_length: longest sequence in tokens; None for the checkpoint's.
    seed: >= 0, of data order and of every generated response.
    precision: "32", or "bf16" with fp32 main parameters.
    restore_from_path: the SFT checkpoint.
    tokenizer: None for the checkpoint's own.
    validation_ds: None for no validation.
    """

    loop: LoopConfig
    spin: AlgorithmConfig
    parallel: ParallelConfig
    optim: OptimConfig
    train_ds: DatasetConfig
    validation_ds: DatasetConfig | None
    micro_batch_size: int
    micro_batch_tokens: int | None
    packed_sequence: bool | None
    global_batch_size: int
    encoder_seq_length: int | None
    seed: int
    precision: str
    restore_from_path: str
    tokenizer: TokenizerConfig | None
    recompute: RecomputeConfig
    checkpoint: CheckpointConfig
