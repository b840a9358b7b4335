"""Losses of every kind, and pairs that share a prompt: against fp64 one pair at a time, and in every layout."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import training_run
from selfplay import SelfPlay, relative_distance, whole_weights
from toy import to_transformers

from nemo_spin.config import LossConfig
from nemo_spin.data.example import Example
from nemo_spin.reporting.metrics_log import FILE_NAME
from nemo_spin.selfplay import step
from nemo_spin.selfplay.losses import LN_2, PAPER
from nemo_spin.selfplay.pairs import Pair
from nemo_spin.selfplay.step import spin_metrics_of, spin_step

EVERYTHING = LossConfig("hinge", label_smoothing=0.1, sft_loss_weight=0.3, preference_average_log_probs=True)
LOSSES = {
    "paper": (PAPER, 0.5),
    "hinge-smoothed-averaged-sft": (EVERYTHING, 4.0),
    "exponential-sft": (replace(PAPER, loss_type="exponential", sft_loss_weight=1.0), 0.2),
    "correlation-smoothed": (replace(PAPER, loss_type="correlation", label_smoothing=0.3), 0.5),
    "logistic-smoothed-averaged": (replace(PAPER, label_smoothing=0.2, preference_average_log_probs=True), 4.0),
}


def several_pairs() -> list[Pair]:
    """Of four examples 3, 1, 4 and 3 pairs; one response comes twice, and once more under another reference."""
    generator = torch.Generator().manual_seed(7)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(8, 251, (length,), generator=generator).tolist())

    def reference(response: tuple[int, ...]) -> float:
        return -(5.5 + 1.5 * float(torch.rand((), generator=generator) - 0.5)) * len(response)

    pairs = []
    for index, (prompt, chosen, rejected) in enumerate(
        [(9, 6, (4, 11, 2)), (3, 2, (7,)), (5, 9, (6, 3)), (12, 1, (8, 1, 5))]
    ):
        example = Example(index, ids(prompt), ids(chosen))
        of_chosen = reference(example.response_ids)
        pairs += [Pair(example, r, "stop", of_chosen, reference(r)) for r in map(ids, rejected)]
        if index == 2:
            again = replace(
                pairs[-1], ref_chosen_logps=of_chosen - 2, ref_rejected_logps=pairs[-1].ref_rejected_logps + 1
            )
            pairs += [pairs[-1], again]
    return pairs


def apart(pairs: list[Pair]) -> list[Pair]:
    """The same, none of which share an example."""
    return [replace(pair, example=replace(pair.example, index=i)) for i, pair in enumerate(pairs)]


def a_step(loss: LossConfig, beta: float, unshared: bool = False, **options: Any) -> dict[str, Any]:
    """The metrics of a step and of a validation before it, and this rank's part of the gradient."""
    play = SelfPlay(**options)
    pairs = apart(several_pairs()) if unshared else several_pairs()
    play.optimizer.start(1e-3, 2)
    validation = spin_metrics_of(play.gpt, pairs, beta, play.batching, loss)
    metrics = spin_step(play.optimizer, pairs, beta, play.batching, loss)
    with torch.no_grad():
        for parameter in play.gpt.parameters():
            parameter.copy_(parameter.main_grad)
    in_transformers = None
    if torch.distributed.get_world_size() == 1:
        whole_model = to_transformers(play.architecture, play.gpt)
        in_transformers = {name: p.detach() for name, p in whole_model.named_parameters()}
    computed = sum(m.inputs.tokens.numel() for m in step._micro_batches(pairs, play.batching))
    return {
        "metrics": metrics,
        "validation": {name: value / len(pairs) for name, value in validation.items()},
        "gradient": play.shards(),
        "in_transformers": in_transformers,
        "computed": computed,
    }


def whole(results: list[dict[str, Any]]) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    for result in results:
        assert result["metrics"] == results[0]["metrics"]
        assert result["validation"] == pytest.approx(
            {name: results[0]["metrics"][name] for name in result["validation"]}, rel=1e-6, abs=1e-7
        )
    return results[0]["metrics"], whole_weights([result["gradient"] for result in results])


# ---------------------------------------------------------------------------------------- against fp64


def in_fp64(loss: LossConfig, beta: float) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Metrics and clipped gradient of the same step, sequence by sequence, by transformers' model."""
    play, pairs = SelfPlay(), several_pairs()
    model = to_transformers(play.architecture, play.gpt).double()

    def logps(prompt: tuple[int, ...], response: tuple[int, ...]) -> torch.Tensor:
        log_softmax = model(torch.tensor([[*prompt, *response]])).logits[0].log_softmax(-1)
        return sum(log_softmax[len(prompt) + i - 1, token] for i, token in enumerate(response))

    of_margin = {
        "logistic": lambda t: (1 + (-t).exp()).log(),
        "hinge": lambda t: (1 - t).clamp(min=0),
        "exponential": lambda t: (-t).exp(),
        "correlation": lambda t: 1 - t,
    }[loss.loss_type]
    rows = []
    for pair in pairs:
        prompt, human = pair.example.prompt_ids, pair.example.response_ids
        chosen, rejected = logps(prompt, human), logps(prompt, pair.rejected_ids)
        gains = [chosen - pair.ref_chosen_logps, rejected - pair.ref_rejected_logps]
        if loss.preference_average_log_probs:
            gains = [gain / len(ids) for gain, ids in zip(gains, (human, pair.rejected_ids), strict=True)]
        margin = beta * (gains[0] - gains[1])
        smoothing = loss.label_smoothing
        spin = (1 - smoothing) * of_margin(margin) + smoothing * of_margin(-margin)
        nll = -chosen / len(human)
        rows.append(
            {
                "loss": spin + loss.sft_loss_weight * nll,
                "spin_loss": spin,
                "sft_loss": nll,
                "rewards/chosen": beta * gains[0],
                "rewards/rejected": beta * gains[1],
                "rewards/margins": margin,
                "rewards/accuracies": (margin > 0).double(),
                "logps/chosen": chosen,
                "logps/rejected": rejected,
                "kl": pair.ref_rejected_logps - rejected,
                "on the hinge's slope": (margin < 1).double(),
            }
        )
    means = {name: torch.stack([row[name] for row in rows]).mean() for name in rows[0]}
    means["loss"].backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    clip = min(1.0, 1.0 / (norm + 1e-6))
    metrics = {name: value.item() for name, value in means.items()} | {"grad_norm": norm}
    return metrics, {name: p.grad * clip for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_that_of_an_independent_fp64_implementation(workers: Any, name: str) -> None:
    loss, beta = LOSSES[name]
    (result,) = workers.run(a_step, loss, beta, micro_batch_size=4)
    ((expected, gradient),) = workers.run(in_fp64, loss, beta)
    assert 0 < expected["rewards/accuracies"] < 1
    on_the_slope = expected.pop("on the hinge's slope")
    assert loss.loss_type != "hinge" or 0 < on_the_slope < 1
    metrics, _ = whole([result])
    if loss.sft_loss_weight == 0:
        assert "spin_loss" not in metrics and "sft_loss" not in metrics
        del expected["spin_loss"], expected["sft_loss"]
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert relative_distance(result["in_transformers"], gradient) < 1e-5


# ---------------------------------------------------------------------------------------- layouts


LAYOUTS = {
    "tp2": ({"tp": 2}, {"micro_batch_size": 4}),
    "pp2": ({"pp": 2}, {"micro_batch_size": 3}),
    "dp2": ({"dp": 2}, {"micro_batch_size": 3}),
    "dp2-micro-batch-tokens": ({"dp": 2}, {"micro_batch_tokens": 40}),
    "dp2-padded-micro-batch-tokens": ({"dp": 2}, {"micro_batch_tokens": 70, "packed": False}),
    "tp2-pp2-sequence-parallel-recompute": (
        {"tp": 2, "pp": 2},
        {"micro_batch_tokens": 60, "sequence_parallel": True, "recompute": "full"},
    ),
    "dp4": ({"dp": 4}, {"micro_batch_size": 9}),
}


@pytest.fixture(scope="module")
def one_process(workers: Any) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Pair by pair."""
    return whole(workers.run(a_step, EVERYTHING, 4.0, unshared=True, micro_batch_size=1, packed=False))


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_has_the_loss_and_gradient_of_one_process(workers: Any, one_process: Any, name: str) -> None:
    layout, options = LAYOUTS[name]
    metrics, gradient = whole(workers.run(a_step, EVERYTHING, 4.0, **options, **layout))
    assert metrics == pytest.approx(one_process[0], rel=1e-5, abs=1e-6)
    assert relative_distance(gradient, one_process[1]) < 1e-5


# ---------------------------------------------------------------------------------------- shared prompts


SIZES = {
    **{f"micro-batch-size-{size}": {"micro_batch_size": size} for size in (1, 2, 3, 5, 11)},
    **{f"micro-batch-tokens-{tokens}": {"micro_batch_tokens": tokens} for tokens in (1, 30, 55, 200)},
    "padded": {"micro_batch_size": 4, "packed": False},
    "padded-micro-batch-tokens": {"micro_batch_tokens": 65, "packed": False},
}


@pytest.mark.parametrize("name", SIZES)
def test_pairs_that_share_a_prompt_are_those_that_do_not(workers: Any, one_process: Any, name: str) -> None:
    (result,) = workers.run(a_step, EVERYTHING, 4.0, **SIZES[name])
    metrics, gradient = whole([result])
    assert metrics == pytest.approx(one_process[0], rel=1e-5, abs=1e-6)
    assert relative_distance(gradient, one_process[1]) < 1e-5


def test_what_pairs_share_is_computed_once(workers: Any) -> None:
    def computed(**options: Any) -> int:
        return workers.run(a_step, PAPER, 0.5, **options)[0]["computed"]

    pairs = several_pairs()
    rejected = sum(len(pair.rejected_ids) for pair in pairs)
    shared = {pair.example: len(pair.example.prompt_ids) + len(pair.example.response_ids) for pair in pairs}
    assert computed(micro_batch_size=11) == sum(shared.values()) + rejected
    assert computed(micro_batch_size=11, unshared=True) == sum(shared[pair.example] for pair in pairs) + rejected
    assert computed(micro_batch_size=5) == sum(shared.values()) + rejected
    # One at a time there is nothing to share.
    assert computed(micro_batch_size=1) == computed(micro_batch_size=1, unshared=True)


# ---------------------------------------------------------------------------------------- in a run


@pytest.mark.parametrize("loss_type", ["logistic", "hinge"])
def test_a_run_trains_with_the_loss_of_its_configuration(
    workers: Any, inputs: tuple[str, str], tmp_path: Path, loss_type: str
) -> None:
    keys = {
        "loss_type": loss_type,
        "label_smoothing": 0.1,
        "sft_loss_weight": 0.5,
        "preference_average_log_probs": True,
    }
    options = {f"model.spin.{key}": value for key, value in keys.items()}
    options["model.spin.ref_policy_kl_penalty"] = [2.0, 4.0]
    (result,) = workers.run(training_run, *inputs, str(tmp_path), **options)
    assert result["finished"]
    lines = map(json.loads, (tmp_path / FILE_NAME).read_text().splitlines())
    trained = [line for line in lines if line["kind"] == "train"]
    # Six steps an iteration; that the first one is accepted says that the check knows the loss.
    at_zero = LN_2 if loss_type == "logistic" else 1.0
    assert [trained[i]["spin_loss"] for i in (0, 6)] == pytest.approx([at_zero] * 2, abs=1e-4)
    for line in trained:
        assert line["loss"] == pytest.approx(line["spin_loss"] + 0.5 * line["sft_loss"], rel=1e-6)
