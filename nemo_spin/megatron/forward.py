"""Runs micro-batches through the pipeline, forward only or forward and backward.

The objective sees log-probabilities only; what the pipeline stages exchange, and which of them has the output layer, is
megatron-core's business and ends here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from nemo_spin.megatron import gpt
from nemo_spin.megatron.packing import ModelInput
from nemo_spin.runtime.watchdog import beat

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class MicroBatch(Generic[T]):
    """What goes through the model together, and what the objective needs to know of it.

    context: handed to the objective, its tensors on the model's device.
    weight: 0 where it only keeps this rank in step with the others and counts for nothing, else 1.
    """

    inputs: ModelInput
    context: T
    weight: float = 1.0


Objective = Callable[[T, Tensor], tuple[Tensor, dict[str, Tensor]]]
"""(context, per_token_logps) -> (scalar to minimize, detached tensors to return).

per_token_logps: fp32 [responses, longest], 0 behind the end of each; all first responses of the micro-batch's groups
come before all second ones.
"""


def run(
    model: torch.nn.Module,
    micro_batches: Sequence[MicroBatch[T]],
    objective: Objective[T],
    vocab_size: int,
    *,
    forward_only: bool,
    scale: float = 1.0,
    progress: Callable[[int], None] | None = None,
) -> list[dict[str, Tensor]]:
    """The objective's second value for each micro-batch, in order, on every pipeline stage.

    model: GPTModel or its DDP wrapper; every process of a data-parallel replica passes the same micro-batches.
    What is differentiated is `scale` times the weighted sum over micro-batches of the objective's first value, averaged
    over data parallel.
    progress: told the number of responses of each micro-batch that has passed this stage.
    """
    count = len(micro_batches)
    device = next(model.parameters()).device

    def forward_step(iterator: Iterator[MicroBatch[T]], model: torch.nn.Module) -> tuple[Tensor, Callable]:
        beat()
        micro_batch = _moved(next(iterator), device)
        inputs = micro_batch.inputs
        output = gpt.forward(model, inputs, vocab_size)
        if progress is not None:
            progress(len(inputs.targets.lengths))

        def loss_func(logps: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            loss, values = objective(micro_batch.context, inputs.targets.by_response(logps))
            # The schedule divides by the number of micro-batches, in place.
            return loss * scale * count * micro_batch.weight, values

        return output, loss_func

    values = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(micro_batches),
        model=[model],
        num_microbatches=count,
        # Of no effect where it matters: pipeline stages tell each other the shape of what they send.
        seq_length=max(micro_batch.inputs.tokens.shape[1] for micro_batch in micro_batches),
        micro_batch_size=micro_batches[0].inputs.tokens.shape[0],
        forward_only=forward_only,
    )
    return from_last_stage(values)


def from_last_stage(value: T) -> T:
    """What the last pipeline stage holds, on every stage."""
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return value
    box = [_moved(value, torch.device("cpu"))]
    dist.broadcast_object_list(
        box,
        src=parallel_state.get_pipeline_model_parallel_last_rank(),
        group=parallel_state.get_pipeline_model_parallel_group(),
    )
    return box[0]


def _moved(value: Any, device: torch.device) -> Any:
    """A copy whose tensors are on the device, also those within containers and dataclasses."""
    if isinstance(value, Tensor):
        # The host does not wait for what runs on a GPU, but has to wait for what comes from there.
        return value.to(device, non_blocking=device.type != "cpu")
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_moved(item, device) for item in value)
    if is_dataclass(value):
        return type(value)(*(_moved(getattr(value, field.name), device) for field in fields(value)))
    return value
