"""SPIN steps: against an independent fp64 implementation, and the same in every parallel layout."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from selfplay import BETA, SelfPlay, as_pairs, examples, relative_distance, whole_weights
from toy import to_transformers

from nemo_spin.selfplay.losses import LN_2
from nemo_spin.selfplay.step import spin_metrics_of, spin_step

# ---------------------------------------------------------------------------------------- against fp64


def one_step_beside_fp64(eps: float) -> dict[str, Any]:
    """Two SPIN steps by us, and the second by twenty lines on transformers' model in fp64."""
    play = SelfPlay(eps=eps)
    data = examples()
    pairs = as_pairs(data, play.roll_out(data, 0))
    play.optimizer.start(1e-3, 10)
    play.step(pairs)  # policy and reference differ from here on: the margin is not 0
    play.optimizer.start(1e-3, 10)
    theirs = to_transformers(play.architecture, play.gpt).double()
    ours = play.step(pairs)

    def logps(prompt: tuple[int, ...], response: tuple[int, ...]) -> torch.Tensor:
        ids = torch.tensor([[*prompt, *response]])
        log_softmax = theirs(ids).logits[0].log_softmax(-1)
        return sum(log_softmax[len(prompt) + i - 1, token] for i, token in enumerate(response))

    margins = []
    for pair in pairs:
        chosen = logps(pair.example.prompt_ids, pair.example.response_ids) - pair.ref_chosen_logps
        rejected = logps(pair.example.prompt_ids, pair.rejected_ids) - pair.ref_rejected_logps
        margins.append(BETA * (chosen - rejected))
    loss = -torch.stack(margins).sigmoid().log().mean()
    loss.backward()
    grad_norm = torch.stack([p.grad.norm() for p in theirs.parameters()]).norm()
    lr, clip = 1e-3 / 2, min(1.0, 1.0 / (grad_norm.item() + 1e-6))
    with torch.no_grad():
        for parameter in theirs.parameters():
            grad = parameter.grad * clip
            decay = 0.1 if parameter.dim() > 1 else 0.0
            parameter -= lr * (grad / (grad.abs() + eps) + decay * parameter)
    stepped = dict(to_transformers(play.architecture, play.gpt).named_parameters())
    distances = {n: float((stepped[n] - p).norm() / p.norm()) for n, p in theirs.named_parameters()}
    return {
        "loss": (ours["loss"], loss.item()),
        "grad_norm": (ours["grad_norm"], grad_norm.item()),
        "margin": (ours["rewards/margins"], torch.stack(margins).mean().item()),
        "distances": distances,
    }


def test_a_step_is_that_of_an_independent_fp64_implementation(workers: Any) -> None:
    # A large eps keeps Adam from blowing the rounding errors of near-zero gradients up to whole updates.
    (result,) = workers.run(one_step_beside_fp64, 1e-2)
    for name in ("loss", "grad_norm", "margin"):
        ours, theirs = result[name]
        assert ours == pytest.approx(theirs, rel=1e-5), name
    assert abs(result["loss"][0] - LN_2) > 1e-3
    assert max(result["distances"].values()) < 1e-6, result["distances"]


# ---------------------------------------------------------------------------------------- layouts


def two_iterations(**options: Any) -> dict[str, Any]:
    play = SelfPlay(**options)
    history = list(play.iterations(2, examples()))
    return {"history": history, "shards": play.shards()}


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    for result in results[1:]:
        assert result["history"] == results[0]["history"]
    return {"history": results[0]["history"], "weights": whole_weights([result["shards"] for result in results])}


@pytest.fixture(scope="session")
def baseline(workers: Any) -> dict[str, Any]:
    return summary(workers.run(two_iterations))


LAYOUTS = {
    "tp2": ({"tp": 2}, {}),
    "pp2": ({"pp": 2}, {}),
    "tp2-pp2": ({"tp": 2, "pp": 2}, {}),
    "dp2": ({"dp": 2}, {}),
    "tp2-dp2": ({"tp": 2, "dp": 2}, {}),
    "tp2-pp2-sequence-parallel": ({"tp": 2, "pp": 2}, {"sequence_parallel": True}),
    "dp2-distributed-optimizer": ({"dp": 2}, {"name": "distributed_fused_adam"}),
    "pp2-dp2-distributed-optimizer-recompute": (
        {"pp": 2, "dp": 2},
        {"name": "distributed_fused_adam", "recompute": "full"},
    ),
    "micro-batch-size-1": ({}, {"micro_batch_size": 1}),
    "micro-batch-size-4": ({}, {"micro_batch_size": 4}),
    "dp2-micro-batch-size-4": ({"dp": 2}, {"micro_batch_size": 4}),
    "padded": ({}, {"packed": False}),
    "dp2-padded-micro-batch-tokens": ({"dp": 2}, {"packed": False, "micro_batch_tokens": 80}),
    "dp2-micro-batch-tokens": ({"dp": 2}, {"micro_batch_tokens": 50}),
    "pp2-sequence-parallel-micro-batch-tokens": (
        {"pp": 2, "tp": 2},
        {"micro_batch_tokens": 50, "sequence_parallel": True},
    ),
    "selective-recompute": ({"tp": 2}, {"recompute": "selective"}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_trains_and_generates_the_same(workers: Any, baseline: dict[str, Any], name: str) -> None:
    layout, options = LAYOUTS[name]
    result = summary(workers.run(two_iterations, **options, **layout))
    for step, expected in zip(result["history"], baseline["history"], strict=True):
        assert step["rollouts"] == expected["rollouts"]
        assert step["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert step["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
        assert step["logps/rejected"] == pytest.approx(expected["logps/rejected"], rel=1e-5)
    assert relative_distance(result["weights"], baseline["weights"]) < 1e-5


def a_step_on_one_pair() -> dict[str, Any]:
    play = SelfPlay()
    data = examples(1)
    play.optimizer.start(1e-3, 2)
    return {"history": [play.step(as_pairs(data, play.roll_out(data, 0)))], "shards": play.shards()}


def test_a_batch_of_fewer_pairs_than_replicas_is_that_of_its_pairs(workers: Any) -> None:
    expected, result = (summary(workers.run(a_step_on_one_pair, dp=dp)) for dp in (1, 2))
    assert result["history"][0] == pytest.approx(expected["history"][0], rel=1e-5)
    assert relative_distance(result["weights"], expected["weights"]) < 1e-5


def test_tied_embeddings_stay_tied_over_pipeline_stages(workers: Any) -> None:
    options = {"architecture": {"share_embeddings_and_output_weights": True}}
    expected = summary(workers.run(two_iterations, **options))
    result = summary(workers.run(two_iterations, **options, pp=2, tp=2))
    assert relative_distance(result["weights"], expected["weights"]) < 1e-5


def test_bf16_keeps_fp32_parameters(workers: Any) -> None:
    # Steps of 1e-5 are below bf16's resolution of most weights: only fp32 copies can add them up.
    options = {"precision": "bf16", "name": "distributed_fused_adam"}
    fine = summary(workers.run(two_iterations, **options, dp=2))
    assert fine["history"][0]["loss"] == pytest.approx(LN_2, abs=0.02)
    moved = workers.run(small_steps_in_bf16)[0]
    assert moved["share_of_bf16_weights_that_changed"] > 0.2
    assert moved["fp32_distance"] > 0


def small_steps_in_bf16() -> dict[str, float]:
    play = SelfPlay(precision="bf16", sched=_constant())
    before = [p.detach().clone() for p in play.gpt.parameters()]
    data = examples()
    pairs = as_pairs(data, play.roll_out(data, 0))
    play.optimizer.start(2e-5, 60)
    for _ in range(60):
        spin_step(play.optimizer, pairs, BETA, play.batching)
    changed = sum(int((a != b).sum()) for a, b in zip(before, play.gpt.parameters(), strict=True))
    total = sum(p.numel() for p in play.gpt.parameters())
    distance = sum(float((a.float() - b.float()).norm()) for a, b in zip(before, play.gpt.parameters(), strict=True))
    return {"share_of_bf16_weights_that_changed": changed / total, "fp32_distance": distance}


def _constant() -> Any:
    from nemo_spin.config import SchedConfig

    return SchedConfig(name="Constant", warmup_steps=0, constant_steps=0, min_lr=0.0)


# ---------------------------------------------------------------------------------------- contracts


def first_steps(iterations: int) -> list[dict[str, float]]:
    return list(SelfPlay().iterations(iterations, examples()))[::2]


def test_the_first_step_of_every_iteration_has_loss_ln_2(workers: Any) -> None:
    for metrics in workers.run(first_steps, 3, tp=2)[0]:
        assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert metrics["rewards/chosen"] == pytest.approx(0, abs=1e-4)
        assert metrics["rewards/accuracies"] >= 0


def rollouts_of_a_later_window() -> dict[str, Any]:
    play = SelfPlay(keep_reference=True)
    data = examples()
    at_start = play.roll_out(data, 0)
    play.optimizer.start(1e-2, 4)
    for _ in range(2):
        play.step(as_pairs(data, at_start))
    before = [p.detach().clone() for p in play.gpt.parameters()]
    later = play.roll_out(data, 0)
    restored = all(torch.equal(a, b) for a, b in zip(before, play.gpt.parameters(), strict=True))
    by_policy = roll_out_with_the_policy(play, data)
    return {"at_start": at_start, "later": later, "by_policy": by_policy, "restored": restored}


def roll_out_with_the_policy(play: SelfPlay, data: list) -> list:
    play.reference.refresh()
    return play.roll_out(data, 0)


@pytest.mark.parametrize("layout", [{"tp": 2}, {"dp": 2}])
def test_a_later_window_is_rolled_out_by_the_reference(workers: Any, layout: dict[str, int]) -> None:
    result = workers.run(rollouts_of_a_later_window, **layout)[0]
    assert result["later"] == result["at_start"]
    assert result["restored"]
    assert result["by_policy"] != result["at_start"]


def rollouts_without_a_copy() -> str:
    play = SelfPlay(keep_reference=False)
    play.reference.policy_moved()
    try:
        play.roll_out(examples(), 0)
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_reference_that_is_gone_is_never_replaced_by_the_policy(workers: Any) -> None:
    assert "policy has moved" in workers.run(rollouts_without_a_copy)[0]


def rollouts_of(selection: list[int], seed_of_data: int = 3) -> list:
    play = SelfPlay()
    data = examples()
    return play.roll_out([data[i] for i in selection], 0)


def test_a_rollout_depends_on_its_sample_only(workers: Any) -> None:
    everything = {r.response.index: r.response.ids for r in workers.run(rollouts_of, list(range(7)))[0]}
    for selection in ([3], [6, 0, 3]):
        for rollout in workers.run(rollouts_of, selection)[0]:
            assert rollout.response.ids == everything[rollout.response.index]


def with_known_responses(known: tuple[int, ...], interrupt: bool = False) -> dict[str, Any]:
    """Twice the same rollouts, the second time with some responses known already."""
    from nemo_spin.selfplay.rollouts.roll_out import RolloutRequest

    play, data = SelfPlay(), examples()
    expected = play.roll_out(data, 0)
    given = {rollout.response.key: rollout.response for rollout in expected if rollout.response.index in known}
    request = RolloutRequest(data, 0, known=dict(given), interrupted=lambda: interrupt)
    result = play.respond(request)
    generated = {key[0]: response.ids for key, response in result.responses.items()}
    return {
        "is_as_before": result.rollouts == expected,
        "is_whole": result.rollouts is not None,
        "generated": sorted(generated),
        "request_is_untouched": request.known == given,
    }


@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"dp": 2}], ids=str)
def test_known_responses_are_scored_and_not_generated_again(workers: Any, layout: dict[str, int]) -> None:
    for result in workers.run(with_known_responses, (0, 2, 5), **layout):
        assert result["is_as_before"] and result["request_is_untouched"]
        assert result["generated"] == [1, 3, 4, 6]
    for result in workers.run(with_known_responses, tuple(range(7)), True, **layout):
        assert result["is_as_before"] and not result["generated"], "nothing is left that could be interrupted"


def test_an_interruption_leaves_no_rollouts(workers: Any) -> None:
    for result in workers.run(with_known_responses, (0, 2, 5), True, dp=2):
        assert not result["is_whole"] and not result["generated"] and result["request_is_untouched"]


def gradients_of_the_parts() -> dict[str, float]:
    """|gradient| of the log-probability with respect to the logits, at prompt, response, stop token and padding."""
    from nemo_spin.megatron.logprobs import target_logps
    from nemo_spin.megatron.packing import padded
    from nemo_spin.megatron.sequences import ResponseGroup

    batch = padded([ResponseGroup((1, 2, 3), ((5, 6, 7),)), ResponseGroup((4,), ((8, 7),))], pad_id=7)
    # With the identity for an output layer, hidden states are logits.
    logits = torch.randn(6, 2, 16, requires_grad=True)
    logps = batch.targets.by_response(target_logps(logits, torch.eye(16), batch.targets, vocab_size=12))
    logps.sum().backward()
    grad = logits.grad.transpose(0, 1)
    touched = (grad.abs().sum(-1) > 0).int().tolist()
    return {
        "touched": touched,
        "padding": float(grad[..., 12:].abs().max()),
        "shape": tuple(logps.shape),
        "finite": bool(logps.isfinite().all() and grad.isfinite().all()),
    }


def test_the_stop_token_gets_gradient_and_no_prompt_token_does(workers: Any) -> None:
    (result,) = workers.run(gradients_of_the_parts)
    # Position t of the logits predicts token t + 1: responses at tokens 3..5 and 1..2 are predicted one earlier.
    assert result["touched"] == [[0, 0, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]]
    assert result["padding"] == 0.0
    assert result["shape"] == (2, 3)
    assert result["finite"]


def padded_vocabulary() -> torch.Tensor:
    from megatron.core import parallel_state

    from nemo_spin.megatron.logprobs import target_logps
    from nemo_spin.megatron.packing import padded
    from nemo_spin.megatron.sequences import ResponseGroup

    batch = padded([ResponseGroup((1, 2), ((3, 4),))], pad_id=0)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 4, 16, generator=generator)
    logits[..., 13:] = 50.0  # padding rows that would win the softmax
    rank, size = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    own = torch.eye(16).chunk(size)[rank]
    expected = logits[0, :, :13].log_softmax(-1)
    return target_logps(logits.transpose(0, 1), own, batch.targets, 13) - torch.stack([expected[1, 3], expected[2, 4]])


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_padding_of_the_vocabulary_is_outside_the_softmax(workers: Any, tp: int) -> None:
    for difference in workers.run(padded_vocabulary, tp=tp):
        assert difference.abs().max() < 1e-5


def metrics_with_and_without_a_step(**layout: int) -> tuple[dict[str, float], dict[str, float]]:
    play = SelfPlay()
    data = examples()
    pairs = as_pairs(data, play.roll_out(data, 0))
    play.optimizer.start(1e-2, 5)
    play.step(pairs)
    without = spin_metrics_of(play.gpt, pairs, BETA, play.batching)
    return {name: value / len(pairs) for name, value in without.items()}, play.step(pairs)


@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"pp": 2}, {"dp": 2}], ids=str)
def test_validation_has_the_figures_of_a_step(workers: Any, layout: dict[str, int]) -> None:
    for without, step in workers.run(metrics_with_and_without_a_step, **layout):
        assert without == pytest.approx({name: step[name] for name in without}, rel=1e-6)
        assert {"loss", "kl", "rewards/margins", "rewards/accuracies"} <= without.keys()


# ---------------------------------------------------------------------------------------- optimizer


def learning_rates(total_steps: int, warmup_steps: int, style: str) -> list[float]:
    from nemo_spin.config import SchedConfig

    sched = SchedConfig(name=style, warmup_steps=warmup_steps, constant_steps=2, min_lr=1e-4)
    play = SelfPlay(sched=sched)
    data = examples()
    pairs = as_pairs(data, play.roll_out(data, 0))
    play.optimizer.start(1e-3, total_steps)
    return [play.step(pairs)["lr"] for _ in range(total_steps)]


def test_the_learning_rate_follows_its_schedule(workers: Any) -> None:
    (rates,) = workers.run(learning_rates, 12, 2, "CosineAnnealing")
    decay = [1e-4 + 9e-4 * 0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(9)]
    assert rates == pytest.approx([5e-4, *decay, 1e-4, 1e-4])
    (rates,) = workers.run(learning_rates, 4, 0, "LinearAnnealing")
    assert rates == pytest.approx([1e-3, 5.5e-4, 1e-4, 1e-4])
    # A warm-up that is longer than the iteration is cut so that its last step has the peak.
    (rates,) = workers.run(learning_rates, 3, 10, "Constant")
    assert rates == pytest.approx([5e-4, 1e-3, 1e-3])


def a_step_after(steps_before: int, fresh: bool) -> list:
    """The update that a step makes from the toy's initial weights, with an optimizer that has done others before."""
    play = SelfPlay(weight_decay=0.0)
    data = examples()
    pairs = as_pairs(data, play.roll_out(data, 0))
    initial = [p.detach().clone() for p in play.gpt.parameters()]
    play.optimizer.start(1e-3, 100)
    for _ in range(steps_before):
        play.step(pairs)
    with torch.no_grad():
        for parameter, value in zip(play.gpt.parameters(), initial, strict=True):
            parameter.copy_(value)
    play.optimizer.start(1e-3, 100, fresh=fresh)
    play.step(pairs)
    return play.shards()


def test_a_fresh_optimizer_has_forgotten_what_it_did(workers: Any) -> None:
    new = whole_weights(workers.run(a_step_after, 0, True))
    reset = whole_weights(workers.run(a_step_after, 3, True))
    carried_on = whole_weights(workers.run(a_step_after, 3, False))
    assert relative_distance(reset, new) == 0.0
    assert relative_distance(carried_on, new) > 1e-5
