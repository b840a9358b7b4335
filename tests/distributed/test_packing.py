"""Packed pairs that share their prompt, beside the same sequences one by one; log-probabilities beside fp64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from selfplay import BETA, SelfPlay

from nemo_spin.data.example import Example
from nemo_spin.megatron import logprobs, steps
from nemo_spin.megatron.packing import packed
from nemo_spin.megatron.sequences import ResponseGroup
from nemo_spin.selfplay import step
from nemo_spin.selfplay.losses import PAPER
from nemo_spin.selfplay.pairs import Pair, group_of_pair
from nemo_spin.selfplay.step import spin_objective

# The toy with learned positions, LayerNorm, biases and tied embeddings.
GPT2 = {
    "num_query_groups": 4,
    "normalization": "LayerNorm",
    "gated_linear_unit": False,
    "add_bias_linear": True,
    "position_embedding_type": "learned_absolute",
    "share_embeddings_and_output_weights": True,
}


def skewed_pairs() -> list[Pair]:
    """Prompts and responses of 1 to 40 tokens, chosen and rejected of different lengths."""
    generator = torch.Generator().manual_seed(5)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(8, 251, (length,), generator=generator).tolist())

    lengths = [(9, 3, 40), (1, 30, 1), (25, 7, 7), (2, 1, 12), (13, 5, 2)]
    return [Pair(Example(i, ids(p), ids(c)), ids(r), "stop", -c, -r) for i, (p, c, r) in enumerate(lengths)]


def packed_beside_separate(**options: Any) -> dict[str, Any]:
    """The largest relative difference of a parameter's gradient, the metrics, and the log-probabilities, both ways."""
    play, pairs = SelfPlay(**options), skewed_pairs()
    found = []
    for batching in (replace(play.batching, packed=False, micro_batch_size=1), replace(play.batching, packed=True)):
        micro_batches = step._micro_batches(pairs, batching)
        metrics = steps.backward(play.optimizer, micro_batches, spin_objective(BETA, PAPER), batching.vocab_size, 5)
        gradients = {name: p.main_grad.clone() for name, p in play.gpt.named_parameters()}
        logps = steps.group_logps(play.gpt, [group_of_pair(pair) for pair in pairs], batching)
        found.append((metrics, gradients, torch.cat([one for both in logps for one in both])))
    (metrics, gradients, logps), (packed_metrics, packed_gradients, packed_logps) = found
    # Of a key's bias the exact gradient is 0.
    largest = max(float(gradient.norm()) for gradient in gradients.values())
    differences = {
        name: float((packed_gradients[name] - gradient).norm() / max(gradient.norm(), 1e-3 * largest))
        for name, gradient in gradients.items()
    }
    shapes = [tuple(micro_batch.inputs.tokens.shape) for micro_batch in micro_batches]
    return {
        "gradients": differences,
        "metrics": (metrics, packed_metrics),
        "logps": float((logps - packed_logps).abs().max()),
        "shapes": shapes,
    }


CASES = {
    "one process": ({}, {}),
    "tp2": ({"tp": 2}, {}),
    "tp2-sequence-parallel": ({"tp": 2}, {"sequence_parallel": True}),
    "pp2-selective": ({"pp": 2}, {"recompute": "selective"}),
    "tp2-pp2-full": ({"tp": 2, "pp": 2}, {"recompute": "full"}),
    "learned-positions-tied": ({}, {"architecture": GPT2}),
    "learned-positions-tied-tp2-pp2-sequence-parallel": (
        {"tp": 2, "pp": 2},
        {"architecture": GPT2, "sequence_parallel": True},
    ),
    "rotary-part-interpolated": ({}, {"architecture": {"rotary_percent": 0.5, "seq_len_interpolation_factor": 4.0}}),
    "bf16": ({}, {"precision": "bf16"}),
}


@pytest.mark.parametrize("name", CASES)
def test_packed_pairs_have_the_gradients_of_separate_sequences(workers: Any, name: str) -> None:
    layout, options = CASES[name]
    tolerance = 0.05 if "precision" in options else 1e-5
    for result in workers.run(packed_beside_separate, micro_batch_size=5, **options, **layout):
        assert max(result["gradients"].values()) < tolerance, result["gradients"]
        separate, together = result["metrics"]
        assert together == pytest.approx(separate, rel=tolerance, abs=tolerance)
        assert result["logps"] < (0.1 if "precision" in options else 1e-4)
        # Each prompt once: 50 tokens, with the responses 158.
        assert result["shapes"] == [(1, 158)]


def logps_and_gradients(at_a_time: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Of a random hidden state and this rank's rows of an output layer, and those of the formula in fp64."""
    from megatron.core import parallel_state

    rank, size = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    batch = packed([ResponseGroup((1, 2), ((3, 46, 5), (7,))), ResponseGroup((4,), ((8, 44, 9, 0, 23),))], pad_id=0)
    generator = torch.Generator().manual_seed(0)
    # 48 rows, of which 47 are real; with 4 ranks the last one has 11 of them.
    hidden, weight = torch.randn(12, 1, 24, generator=generator), 3 * torch.randn(48, 24, generator=generator)
    coefficients = torch.randn(9, generator=generator)
    hidden, weight = hidden.to(dtype), weight.to(dtype)

    own_hidden, own_weight = hidden.clone().requires_grad_(), weight.chunk(size)[rank].clone().requires_grad_()
    before = logprobs.LOGITS_AT_A_TIME
    logprobs.LOGITS_AT_A_TIME = at_a_time
    try:
        logps = logprobs.target_logps(own_hidden, own_weight, batch.targets, vocab_size=47)
        (logps * coefficients).sum().backward()
    finally:
        logprobs.LOGITS_AT_A_TIME = before

    exact_hidden, exact_weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = (exact_hidden[[1, 2, 3, 1, 6, 7, 8, 9, 10], 0] @ exact_weight.T)[:, :47]
    targets = [3, 46, 5, 7, 8, 44, 9, 0, 23]
    in_order = [0, 1, 2, 4, 5, 6, 7, 8, 3]  # all first responses come before the second one
    exact = logits.log_softmax(-1)[range(9), targets][in_order]
    (exact * coefficients).sum().backward()
    return {
        "logps": logps.detach() - exact.detach(),
        "hidden": own_hidden.grad - exact_hidden.grad,
        "weight": own_weight.grad - exact_weight.grad.chunk(size)[rank],
    }


# Logits of all 9 tokens, of 1, and of 2 at a time, which does not divide them.
@pytest.mark.parametrize("at_a_time", [2**20, 1, 2 * 48 + 1])
@pytest.mark.parametrize("tp", [1, 4])
def test_log_probabilities_in_chunks_are_those_of_the_formula(workers: Any, tp: int, at_a_time: int) -> None:
    for differences in workers.run(logps_and_gradients, at_a_time // tp, torch.float32, tp=tp):
        assert {name: float(value.abs().max()) for name, value in differences.items()} == pytest.approx(
            {"logps": 0, "hidden": 0, "weight": 0}, abs=3e-5
        )


def test_log_probabilities_of_a_bf16_model_are_summed_in_fp32(workers: Any) -> None:
    (differences,) = workers.run(logps_and_gradients, 97, torch.bfloat16)
    # bf16 rounds a logit of 40 by up to 0.125, and a gradient of 3 by up to 0.008.
    assert differences["logps"].abs().max() < 0.25
    assert differences["weight"].abs().max() < 0.25


def largest_tensor_of_logits() -> int:
    """Most elements that a tensor of log-probabilities' forward and backward pass had, with room for 1,000 logits."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple) else (result,):
                if isinstance(tensor, torch.Tensor):
                    self.elements = max(self.elements, tensor.numel())
            return result

    batch = packed([ResponseGroup((1,), (tuple(range(200)),))], pad_id=0)
    hidden, weight = torch.randn(201, 1, 2, requires_grad=True), torch.randn(250, 2, requires_grad=True)
    before = logprobs.LOGITS_AT_A_TIME
    logprobs.LOGITS_AT_A_TIME = 1000
    try:
        with Largest() as largest:
            logprobs.target_logps(hidden, weight, batch.targets, 250).sum().backward()
    finally:
        logprobs.LOGITS_AT_A_TIME = before
    return largest.elements


def test_no_tensor_holds_the_logits_of_all_tokens(workers: Any) -> None:
    assert workers.run(largest_tensor_of_logits) == [1000]
