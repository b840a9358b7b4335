"""The cost model against what torch counts, and against formulas worked out by hand."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cost_model import (
    Batch,
    Iteration,
    Layout,
    Link,
    Machine,
    Shape,
    bubble_fraction,
    decode_step,
    iteration,
    micro_batch,
    run_batch,
    training_step,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

SHAPE = Shape(layers=3, hidden=32, heads=4, groups=2, head_dim=8, ffn=48, vocab=97)
FREE = Link(bandwidth=float("inf"), latency=0.0)
MACHINE = Machine(1e9, 1e9, 0.0, FREE, FREE, FREE, 4)


class Layer(nn.Module):
    """A Llama's layer, without norms and rotary angles, which hold no matrix products."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        width = shape.heads * shape.head_dim
        self.qkv = nn.Linear(shape.hidden, width + 2 * shape.groups * shape.head_dim, bias=False)
        self.proj = nn.Linear(width, shape.hidden, bias=False)
        self.fc1 = nn.Linear(shape.hidden, 2 * shape.ffn, bias=False)
        self.fc2 = nn.Linear(shape.ffn, shape.hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads, groups, dim = self.shape.heads, self.shape.groups, self.shape.head_dim
        q, k, v = self.qkv(x).split([heads * dim, groups * dim, groups * dim], -1)
        q, k, v = (t.unflatten(-1, (-1, dim)).transpose(1, 2) for t in (q, k, v))
        k, v = (t.repeat_interleave(heads // groups, 1) for t in (k, v))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        gate, up = self.fc1(x).chunk(2, -1)
        return x + self.fc2(F.silu(gate) * up)


def test_flops_and_weights_are_those_that_torch_counts():
    model = nn.Sequential(
        *(Layer(SHAPE) for _ in range(SHAPE.layers)), nn.Linear(SHAPE.hidden, SHAPE.vocab, bias=False)
    )
    batch, length = 2, 11
    counter = FlopCounterMode(display=False)
    with counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(torch.randn(batch, length, SHAPE.hidden))
    tokens = batch * length
    assert counter.get_total_flops() == SHAPE.layers * SHAPE.layer_flops(tokens, length) + SHAPE.output_flops(tokens)
    embedding = SHAPE.vocab * SHAPE.hidden
    assert SHAPE.parameters == sum(p.numel() for p in model.parameters()) + embedding
    assert replace(SHAPE, tied=True).parameters == SHAPE.parameters - embedding


def test_bytes_of_keys_and_values():
    # Llama 2 7B in fp16: 512 KiB a token, as is known.
    assert Shape(32, 4096, 32, 32, 128, 11008, 32000).kv_bytes(2) == 512 * 1024
    assert Shape(80, 8192, 64, 8, 128, 28672, 128256).kv_bytes(2) == 320 * 1024


def test_parameters_of_known_models():
    assert Shape(32, 4096, 32, 32, 128, 11008, 32000).parameters == pytest.approx(6.738e9, rel=1e-3)
    assert Shape(80, 8192, 64, 8, 128, 28672, 128256).parameters == pytest.approx(70.55e9, rel=1e-3)


@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 1), (2, 1), (2, 8), (4, 8), (8, 64)])
def test_bubble_is_what_a_simulated_pipeline_shows(stages, micro_batches):
    ends = [0] * stages
    for _ in range(micro_batches):
        ready = 0
        for stage in range(stages):
            ends[stage] = ready = max(ends[stage], ready) + 1
    assert bubble_fraction(stages, micro_batches) == pytest.approx(1 - micro_batches / ends[-1])
    # Without logits all stages are alike, and the whole model's cost says the same.
    layout, batch = Layout(pp=stages), Batch(micro_batches, 64, 8, 0)
    shape = replace(SHAPE, layers=8)
    cost = run_batch(shape, layout, MACHINE, batch, passes=3)
    assert cost.bubble / cost.seconds == pytest.approx(bubble_fraction(stages, micro_batches))


def test_a_training_step_computes_three_times_the_forward_pass_divided_over_the_processes():
    batch = Batch(4, 100, 10, 30)
    forward = 4 * (SHAPE.layers * SHAPE.layer_flops(100, 10) + SHAPE.output_flops(30)) / MACHINE.flops
    assert training_step(SHAPE, Layout(), MACHINE, batch).compute == pytest.approx(3 * forward)
    assert training_step(SHAPE, Layout(tp=2), MACHINE, batch).compute == pytest.approx(1.5 * forward)
    assert training_step(SHAPE, Layout(), MACHINE, batch, recompute=True).compute == pytest.approx(4 * forward)


def test_communication_is_counted_where_there_is_somebody_to_talk_to():
    slow = Link(bandwidth=1e6, latency=1e-3)
    machine = replace(MACHINE, tensor=slow, pipeline=slow, data=slow)
    batch = Batch(2, 100, 10, 30)
    alone = training_step(SHAPE, Layout(), machine, batch)
    assert alone.tensor == alone.pipeline == alone.bubble == alone.data == 0
    size = 100 * SHAPE.hidden * 4
    # A ring of two: each process sends a half, twice. Four collectives in each layer, for each of two micro-batches.
    in_tensor = 2 * SHAPE.layers * 4 * 2 * (1e-3 + size / 2 / 1e6)
    assert training_step(SHAPE, Layout(tp=2), machine, batch).tensor == pytest.approx(in_tensor)
    assert training_step(SHAPE, Layout(dp=2), machine, batch).data == pytest.approx(
        2 * (1e-3 + 4 * SHAPE.parameters / 2 / 1e6)
    )
    assert micro_batch(SHAPE, Layout(pp=3), machine, batch, 3)[0].pipeline == pytest.approx(2 * (1e-3 + size / 1e6))


def test_decoding_reads_all_weights_until_there_are_rows_enough_to_compute_with():
    few = decode_step(SHAPE, Layout(), MACHINE, rows=1, length=0).seconds
    weights = SHAPE.layers * SHAPE.layer_weights + SHAPE.vocab * SHAPE.hidden
    assert few == pytest.approx(weights * 4 / MACHINE.bandwidth)
    assert decode_step(SHAPE, Layout(), MACHINE, rows=2, length=0).seconds == pytest.approx(few)
    many = decode_step(SHAPE, Layout(), MACHINE, rows=200, length=0).seconds
    assert many == pytest.approx(2 * 200 * weights / MACHINE.flops)
    # With groups in flight a pipeline of two makes as many tokens per process, where computing is what takes the time.
    assert decode_step(SHAPE, Layout(pp=2), MACHINE, 400, 0).seconds < 1.3 * many


def test_an_iteration_is_the_sum_of_its_phases():
    work = Iteration(64, 8, prompt=20, chosen=30, rejected=10, rows=16, micro_batch_tokens=10**9)
    cost = iteration(SHAPE, Layout(), MACHINE, work)
    decode = decode_step(SHAPE, Layout(), MACHINE, 16, 25)
    assert cost.decode.seconds == pytest.approx(decode.seconds * 64 * 10 / 16)
    step = training_step(SHAPE, Layout(), MACHINE, Batch(1, 8 * 60, 20, 8 * 40))
    assert cost.training.seconds == pytest.approx(8 * step.seconds)
    # Two prompts for each pair where they are not shared.
    apart = iteration(SHAPE, Layout(), MACHINE, work, shared_prompt=False)
    tokens = 8 * SHAPE.layers * SHAPE.layer_flops(8 * 20, 20)
    assert apart.training.compute - cost.training.compute == pytest.approx(3 * tokens / MACHINE.flops)
    assert cost.seconds == pytest.approx(
        cost.prefill.seconds + cost.decode.seconds + cost.scoring.seconds + cost.training.seconds
    )
