"""What is not finite in a step that could not be made: found by passes over its batch and over the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from nemo_spin.megatron.finite import gradients_not_finite, weights_not_finite
from nemo_spin.megatron.sequences import Pair, ResponseGroup
from nemo_spin.megatron.steps import Batching, group_logps


@dataclass(frozen=True, slots=True)
class ResponseLogps:
    """The policy's log-probability of a response, computed again without a backward pass.

    total: of the whole response, in nats. bad_tokens: positions in the response, from 0, whose own is not finite.
    """

    total: float
    bad_tokens: tuple[int, ...]

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.total)


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """chosen, rejected: of each pair. weights, gradients: names of parameters where they hold NaN or infinity."""

    chosen: list[ResponseLogps]
    rejected: list[ResponseLogps]
    weights: list[str]
    gradients: list[str]


def diagnose(gpt: GPTModel, pairs: Sequence[Pair], batching: Batching) -> Diagnosis:
    """Look at the model, at the gradients of its last backward pass, and at a global batch; every process calls it."""
    both = group_logps(gpt, [ResponseGroup.of_pair(pair) for pair in pairs], batching)
    chosen, rejected = ([_of_response(values) for values in one] for one in zip(*both, strict=True))
    return Diagnosis(chosen, rejected, weights_not_finite(gpt), gradients_not_finite(gpt))


def _of_response(logps: Tensor) -> ResponseLogps:
    bad = (~logps.isfinite()).nonzero().flatten().tolist()
    return ResponseLogps(float(logps.double().sum()), tuple(bad))
