"""What a run needs of each device's memory, by arithmetic, before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil
import torch

from nemo_spin.errors import ConfigError
from nemo_spin.generation.schedule import groups_wanted
from nemo_spin.megatron.architecture import Architecture, layer_tensors, outer_tensors, parameter_count
from nemo_spin.megatron.gpt import padded_vocab_rows
from nemo_spin.megatron.logprobs import LOGITS_AT_A_TIME
from nemo_spin.model_io.files import GIB

if TYPE_CHECKING:
    from nemo_spin.config import SpinConfig

_BYTES = {"32": 4, "bf16": 2}
# What every tensor-parallel rank holds whole; everything else is split.
_NOT_SPLIT = ("norm", "linear_proj.bias", "linear_fc2.bias", "position_embeddings")


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the device that has most to hold, the host memory of its process, and the numbers behind them.

    parameters: of the whole model. parameters_per_device: of the fullest pipeline stage's tensor-parallel rank.
    weights, gradients, optimizer: exact. kv_cache: at its largest, while all slots hold the longest sequences; of one
        sequence, where there are as many slots as there is memory for.
    activations: about, of a training step whose sequences are as long as the longest example, not in `needed`.
    host: the rollouts of an iteration at their longest, what is held of a checkpoint while it is written, and the
        reference and, while that is in the model, the policy where a copy is kept.
    """

    parameters: int
    parameters_per_device: int
    weights: int
    gradients: int
    optimizer: int
    kv_cache: int
    activations: int
    host: int

    @property
    def needed(self) -> int:
        """What is needed in any case: during generation all of it is there at once."""
        return self.weights + self.gradients + self.optimizer + self.kv_cache

    def __str__(self) -> str:
        return (
            f"{_count(self.parameters)} parameters, {_count(self.parameters_per_device)} per device; GiB per device: "
            f"weights {self.weights / GIB:.2f}, gradients {self.gradients / GIB:.2f}, "
            f"optimizer {self.optimizer / GIB:.2f}, KV cache {self.kv_cache / GIB:.2f}, "
            f"activations about {self.activations / GIB:.2f}; host {self.host / GIB:.2f} per process"
        )


def estimate(
    architecture: Architecture, cfg: SpinConfig, longest: int, context_length: int, examples: int
) -> MemoryEstimate:
    """longest: tokens of the longest example. context_length: of the longest sequence. examples: in an iteration."""
    parallel, transformer = cfg.parallel, architecture.transformer
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    bytes_per_value = _BYTES[cfg.precision]
    per_device = _parameters_per_device(architecture, tp, pp)
    # Adam keeps two moments, RMSProp one.
    moments = 4 if cfg.optim.is_rmsprop else 8
    moments_and_main = moments + (4 if cfg.precision == "bf16" else 0)
    shards = parallel.data_parallel_size if cfg.optim.distributed else 1
    layers = transformer["num_layers"] // pp

    new_tokens = min(cfg.spin.length_params.max_length or context_length, context_length)
    capacity = min(longest + new_tokens, context_length)
    # Without a number there are as many as there is memory for, and at least one.
    slots = cfg.spin.rollout_batch_size * groups_wanted(pp) if cfg.spin.rollout_batch_size else 1
    slots = min(slots, math.ceil(examples / parallel.data_parallel_size) * cfg.spin.num_generations)
    kv_per_token = 2 * layers * transformer["num_query_groups"] // tp * transformer["kv_channels"] * bytes_per_value

    kv_cache = slots * capacity * kv_per_token
    if cfg.spin.kv_cache_gib is not None:
        kv_cache = min(kv_cache, int(cfg.spin.kv_cache_gib * GIB))

    # Of every generation that is trained on: as it was made, and those of earlier iterations scored anew beside it.
    generations = cfg.spin.num_generations * (1 + cfg.spin.replay_iterations)
    generations += cfg.spin.pairs_per_example * cfg.spin.replay_iterations
    rollout_bytes = 4 * examples * new_tokens * generations
    # The first replica writes weights and optimizer; the distributed one is gathered, with fp32 parameters, for that.
    checkpoint = (bytes_per_value + (moments + 4 if cfg.optim.distributed else moments_and_main)) * per_device
    # While the reference is in the model, the policy waits beside where it was.
    reference = 2 * bytes_per_value * per_device if cfg.spin.keeps_reference else 0
    return MemoryEstimate(
        parameters=parameter_count(architecture),
        parameters_per_device=per_device,
        weights=bytes_per_value * per_device,
        gradients=4 * per_device,
        optimizer=moments_and_main * per_device // shards,
        kv_cache=kv_cache,
        activations=_activations(architecture, cfg, min(longest, context_length), bytes_per_value),
        host=rollout_bytes + checkpoint + reference,
    )


def check_fits(needs: MemoryEstimate, cfg: SpinConfig) -> None:
    """Raises ConfigError, in one sentence, where the devices of this machine cannot hold what is needed in any case."""
    available, device = _device_memory(cfg)
    if needs.needed <= available:
        return
    remedies = ["raise model.tensor_model_parallel_size or model.pipeline_model_parallel_size"]
    if not cfg.optim.distributed and cfg.parallel.data_parallel_size > 1:
        remedies.append("set model.optim.name=distributed_fused_adam")
    if needs.kv_cache > needs.needed - available:
        remedies.append("lower model.spin.rollout_batch_size")
    raise ConfigError(
        f"The run needs at least {needs.needed / GIB:.1f} GiB on each {device} (weights {needs.weights / GIB:.1f}, "
        f"gradients {needs.gradients / GIB:.1f}, optimizer {needs.optimizer / GIB:.1f}, KV cache "
        f"{needs.kv_cache / GIB:.1f}), which has {available / GIB:.1f}: {' or '.join(remedies)}."
    )


def _device_memory(cfg: SpinConfig) -> tuple[int, str]:
    """Bytes for each process of this machine, and what they are on."""
    if cfg.parallel.accelerator != "cpu" and torch.cuda.is_available():
        return min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())), "GPU"
    return psutil.virtual_memory().total // cfg.parallel.devices, "process's share of this machine's memory"


def _parameters_per_device(architecture: Architecture, tp: int, pp: int) -> int:
    """Of one tensor-parallel rank of the fullest pipeline stage."""

    def on_rank(name: str, shape: tuple[int, ...]) -> int:
        if any(part in name for part in _NOT_SPLIT):
            return math.prod(shape)
        if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            return padded_vocab_rows(shape[0], tp) // tp * shape[1]
        return math.prod(shape) // tp

    layer = sum(on_rank(name, shape) for name, shape in layer_tensors(architecture.transformer).items())
    layers = layer * architecture.transformer["num_layers"] // pp
    outer = {name: on_rank(name, shape) for name, shape in outer_tensors(architecture).items()}
    if pp == 1:
        return layers + sum(outer.values())
    first = sum(count for name, count in outer.items() if name.startswith("embedding"))
    # the last stage has a copy of a tied embedding
    head = outer.get("output_layer.weight", outer["embedding.word_embeddings.weight"])
    last = head + sum(count for name, count in outer.items() if name.startswith("decoder"))
    return layers + max(first, last)


def _activations(architecture: Architecture, cfg: SpinConfig, length: int, bytes_per_value: int) -> int:
    """Korthikanti et al. 2022 (arXiv 2205.05198), table 2, without dropout's masks and attention's score matrix; the
    first pipeline stage keeps those of as many micro-batches as there are stages. Beside them logits in fp32, no
    more of them than `logprobs` holds at a time."""
    transformer, parallel = architecture.transformer, cfg.parallel
    tp = parallel.tensor_model_parallel_size
    # Two responses that are about as long as the human one, behind a prompt each: what is packed is less.
    tokens = 2 * cfg.micro_batch_size * length
    if cfg.micro_batch_tokens is not None:
        tokens = max(cfg.micro_batch_tokens, 2 * length)
    hidden, ffn = transformer["hidden_size"], transformer["ffn_hidden_size"]
    per_token = 4 * hidden  # norms and the inputs of attention and MLP
    heads = (transformer["num_attention_heads"] + 2 * transformer["num_query_groups"]) * transformer["kv_channels"]
    split = heads + hidden + (3 if transformer["gated_linear_unit"] else 2) * ffn
    per_layer = tokens * (per_token / (tp if parallel.sequence_parallel else 1) + split / tp)
    if cfg.recompute.granularity == "full":
        per_layer = tokens * hidden
    layers = transformer["num_layers"] * per_layer * bytes_per_value
    logits = 2 * 4 * min(tokens * architecture.vocab_rows / tp, LOGITS_AT_A_TIME)
    return int(layers + logits)


def _count(number: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return str(number)
