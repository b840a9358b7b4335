"""Steps whose loss or gradient is not finite: skipped by all processes alike, bit for bit as if they had not been."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from runs import make_checkpoint, make_data, training_run
from selfplay import SelfPlay, as_pairs, examples, whole_weights

from nemo_spin.errors import UserError
from nemo_spin.megatron.optimizer import Optimizer, StepResult

# ------------------------------------------------------------------------------------------ the step itself

DISTRIBUTED_BF16 = {"name": "distributed_fused_adam", "precision": "bf16"}


@contextmanager
def poisoned(gpt: torch.nn.Module, rank: int, parameter: str, value: float) -> Iterator[None]:
    """The gradient that one process computes for one parameter has a value of NaN or infinity."""

    def put_in(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient.view(-1)[0] = value
        return gradient

    hook = None
    if dist.get_rank() == rank:
        hook = dict(gpt.named_parameters())[parameter].register_hook(put_in)
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()


def state_of(play: SelfPlay) -> list[torch.Tensor]:
    """Weights, Adam's moments and, in bf16, its fp32 parameters."""
    moments = [v for values in play.optimizer._moments() for v in values.values() if isinstance(v, torch.Tensor)]
    main = [p.detach() for part in play.optimizer._parts() for p in part.get_parameters()]
    return [tensor.clone() for tensor in [*(p.detach() for p in play.gpt.parameters()), *moments, *main]]


def three_steps(
    rank: int, parameter: str, value: float, poison: bool, options: dict[str, Any]
) -> tuple[dict[str, Any], list]:
    """The second is poisoned, or left out but for the schedule."""
    play = SelfPlay(**options)
    data = examples()
    pairs = as_pairs(data, play.roll_out(data, 0))
    play.optimizer.start(1e-3, 6)
    play.step(pairs[:5])
    before = state_of(play)
    metrics: dict[str, float] = {}
    if poison:
        with poisoned(play.gpt, rank, parameter, value):
            metrics = play.step(pairs)
    else:
        play.optimizer._scheduler.step(1)
    untouched = all(torch.equal(a, b) for a, b in zip(before, state_of(play), strict=True))
    last = play.step(pairs[2:])
    return {"metrics": metrics, "untouched": untouched, "last": last}, play.shards()


QKV = "decoder.layers.0.self_attention.linear_qkv.weight"
# A norm's weight is held by both tensor-parallel processes, and its gradient counted in the norm on the first only.
CASES = {
    "tp2": ({"tp": 2}, 1, QKV, math.nan, {}),
    "tp2-held-by-both": ({"tp": 2}, 1, "decoder.final_layernorm.weight", math.nan, {}),
    "pp2-first-stage": ({"pp": 2}, 0, QKV, math.inf, {}),
    "pp2-last-stage": ({"pp": 2}, 1, QKV, math.nan, {}),
    "dp2": ({"dp": 2}, 1, QKV, math.nan, {}),
    "dp2-distributed-bf16": ({"dp": 2}, 1, QKV, -math.inf, DISTRIBUTED_BF16),
}


@pytest.mark.parametrize("name", CASES)
def test_one_bad_gradient_skips_the_step_everywhere(workers: Any, name: str) -> None:
    layout, *arguments, options = CASES[name]
    results, shards = zip(*workers.run(three_steps, *arguments, True, options, **layout), strict=True)
    for result in results:
        assert result["metrics"]["skipped"] == 1.0
        assert result["untouched"]
        assert result["last"]["skipped"] == 0.0
    left_out, expected = zip(*workers.run(three_steps, *arguments, False, options, **layout), strict=True)
    assert results[0]["last"] == left_out[0]["last"]
    weights, expected_weights = whole_weights(list(shards)), whole_weights(list(expected))
    for key, tensor in expected_weights.items():
        assert torch.equal(weights[key], tensor), key


def a_step_with_infinite_loss() -> tuple[dict[str, float], bool]:
    """The margin is -infinity, where the loss is infinite and its gradient is not."""
    play = SelfPlay()
    data = examples()
    pairs = as_pairs(data, play.roll_out(data, 0))
    pairs[3] = dataclasses.replace(pairs[3], ref_chosen_logps=math.inf)
    play.optimizer.start(1e-3, 6)
    before = state_of(play)
    metrics = play.step(pairs)
    return metrics, all(torch.equal(a, b) for a, b in zip(before, state_of(play), strict=True))


def test_a_loss_that_is_not_finite_is_enough(workers: Any) -> None:
    for metrics, untouched in workers.run(a_step_with_infinite_loss, dp=2):
        assert metrics["loss"] == math.inf and math.isfinite(metrics["grad_norm"])
        assert metrics["skipped"] == 1.0 and untouched


def steps_by(megatron: bool, options: dict[str, Any]) -> tuple[list[float], list]:
    """Three steps, by our optimizer or by megatron-core's own method."""

    def step(self: Optimizer, loss: float = 0.0) -> StepResult:
        lr = self.lr
        _, grad_norm, _ = self._optimizer.step()
        self._scheduler.step(1)
        return StepResult(float(grad_norm), lr, False)

    ours = Optimizer.step
    if megatron:
        Optimizer.step = step
    try:
        play = SelfPlay(**options)
        norms = [metrics["grad_norm"] for metrics in play.iterations(1, examples(), steps_each=3)]
    finally:
        Optimizer.step = ours
    return norms, play.shards()


@pytest.mark.parametrize(
    ("layout", "options"), [({"tp": 2}, {}), ({"dp": 2}, DISTRIBUTED_BF16)], ids=["tp2", "dp2-distributed-bf16"]
)
def test_finite_steps_are_megatron_cores(workers: Any, layout: dict[str, int], options: dict[str, Any]) -> None:
    norms, ours = zip(*workers.run(steps_by, False, options, **layout), strict=True)
    expected_norms, theirs = zip(*workers.run(steps_by, True, options, **layout), strict=True)
    assert norms == expected_norms
    assert max(norms[0]) > 1.0, "nothing was clipped"
    expected = whole_weights(list(theirs))
    for key, tensor in whole_weights(list(ours)).items():
        assert torch.equal(tensor, expected[key]), key


# ------------------------------------------------------------------------------------------ the run


@pytest.fixture(scope="module")
def inputs(workers: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    directory = str(tmp_path_factory.mktemp("inputs"))
    return workers.run(make_checkpoint, directory)[0], make_data(directory)


def run_with_bad_steps(*args: Any, bad: tuple[int, ...], rank: int = 0, **kwargs: Any) -> dict[str, Any]:
    """Of the steps with these numbers, from 1, one process has a gradient that is not finite."""
    from nemo_spin.trainer import SPINTrainer

    right = SPINTrainer.train_step

    def train_step(self: SPINTrainer, batch: Any) -> dict[str, float]:
        if self.progress.step + 1 not in bad:
            return right(self, batch)
        with poisoned(self.policy.gpt, rank, QKV, math.nan):
            return right(self, batch)

    SPINTrainer.train_step = train_step
    try:
        return training_run(*args, **kwargs)
    except UserError as error:
        return {"error": str(error)}
    finally:
        SPINTrainer.train_step = right


def lines_of(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def test_a_run_goes_on_and_counts_over_a_resume(workers: Any, inputs: tuple[str, str], tmp_path: Path) -> None:
    # 7 is the first step of an iteration: the check that its loss is ln 2 comes with step 8.
    bad = {"bad": (3, 4, 7)}
    (whole,) = workers.run(run_with_bad_steps, *inputs, str(tmp_path / "whole"), **bad)
    counts = {"skipped_steps": 3, "skipped_in_a_row": 0}
    assert whole["progress"] == {"iteration": 2, "iteration_step": 0, "step": 12, "consumed_samples": 96} | counts
    lines = lines_of(tmp_path / "whole", "train")
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 2, 2, 2, 3, 3, 3, 3, 3, 3]
    assert all(math.isfinite(v) for line in lines for v in line.values() if isinstance(v, float))
    assert "grad_norm" not in lines[2] and "loss" in lines[2]
    assert lines[7]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    warnings = lines_of(tmp_path / "whole", "warning")
    assert [w["step"] for w in warnings if w["guard"] == "skipped_step"] == [3, 4, 7]

    workers.run(run_with_bad_steps, *inputs, str(tmp_path / "run"), interrupt_after=5, **bad)
    state = json.loads((tmp_path / "run/checkpoints/iteration-000-step-0000004/state.json").read_text())
    assert (state["progress"]["skipped_steps"], state["progress"]["skipped_in_a_row"]) == (2, 2)
    (resumed,) = workers.run(run_with_bad_steps, *inputs, str(tmp_path / "run"), resume=True, **bad)
    assert resumed["progress"] == whole["progress"]
    for (key, _, _, tensor), (_, _, _, expected) in zip(resumed["shards"], whole["shards"], strict=True):
        assert torch.equal(tensor, expected), key


# Layer 0 of the last pipeline stage is layer 2 of the model.
@pytest.mark.parametrize(
    ("layout", "rank", "layer"), [({"tp": 2, "pp": 2}, 3, 2), ({"dp": 2}, 1, 0)], ids=["tp2-pp2", "dp2"]
)
def test_too_many_in_a_row_end_the_run_with_a_report(
    workers: Any, inputs: tuple[str, str], tmp_path: Path, layout: dict[str, int], rank: int, layer: int
) -> None:
    changes = {
        "trainer.spin.max_skipped_steps": 1,
        "model.tensor_model_parallel_size": layout.get("tp", 1),
        "model.pipeline_model_parallel_size": layout.get("pp", 1),
    }
    bad = {"bad": (2, 4, 5, 6), "rank": rank}
    results = workers.run(run_with_bad_steps, *inputs, str(tmp_path), **bad, **changes, **layout)
    path = tmp_path / "non_finite_step_0000005.json"
    assert {result["error"] for result in results} == {results[0]["error"]}
    assert str(path) in results[0]["error"] and "trainer.spin.max_skipped_steps: 1" in results[0]["error"]
    assert [p.name for p in tmp_path.glob("non_finite*")] == [path.name]

    report = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (report["step"], report["skipped_in_a_row"], report["skipped_steps"]) == (5, 2, 3)
    assert (report["grad_norm"], report["beta"], report["weights_not_finite"]) == ("nan", 0.5, [])
    assert report["gradients_not_finite"] == [f"decoder.layers.{layer}.self_attention.linear_qkv.weight"]
    assert math.isfinite(report["loss"]) and report["lr"] > 0
    assert len(report["pairs"]) == 8
    rollouts = {row["index"]: row for row in pq.read_table(tmp_path / "rollouts" / "iteration-000").to_pylist()}
    for pair in report["pairs"]:
        row = rollouts[pair["index"]]
        assert pair["where"] == f"{inputs[1]}:{pair['index'] + 1}"
        assert [pair[k] for k in ("prompt", "chosen", "rejected")] == [row[k] for k in ("prompt", "chosen", "rejected")]
        assert pair["ref_logps_rejected"] == row["ref_rejected_logps"]
        # after three steps of these small rates
        assert pair["logps_rejected"] == pytest.approx(pair["ref_logps_rejected"], rel=0.3)
        assert (pair["finish_reason"], pair["not_finite"]) == (row["finish_reason"], [])


def run_with_bad_scores(
    *args: Any, indices: range | tuple[int, ...], shift: float = math.nan, bad: tuple[int, ...] = (), **kwargs: Any
) -> dict[str, Any]:
    """The reference's log-probabilities of some pairs are off by `shift`."""
    from nemo_spin.selfplay.megatron_policy import MegatronPolicy

    right = MegatronPolicy.roll_out

    def roll_out(*args: Any, **kwargs: Any) -> list:
        return [
            dataclasses.replace(r, ref_chosen_logps=r.ref_chosen_logps + shift) if r.index in indices else r
            for r in right(*args, **kwargs)
        ]

    MegatronPolicy.roll_out = roll_out
    try:
        return run_with_bad_steps(*args, bad=bad, **kwargs)
    finally:
        MegatronPolicy.roll_out = right


def test_pairs_without_a_finite_reference_are_left_out(workers: Any, inputs: tuple[str, str], tmp_path: Path) -> None:
    (result,) = workers.run(run_with_bad_scores, *inputs, str(tmp_path), indices=(3, 17))
    assert result["finished"] and result["progress"]["skipped_steps"] == 0
    assert result["progress"]["consumed_samples"] == 96
    assert all(math.isfinite(step["loss"]) for step in result["history"])
    first = lines_of(tmp_path, "rollout")[0]
    assert first["rollout/not_finite"] == pytest.approx(2 / 24)
    rows = [r for r in pq.read_table(tmp_path / "rollouts/iteration-000").to_pylist() if r["index"] not in (3, 17)]
    entropy = -sum(r["ref_rejected_logps"] for r in rows) / sum(r["rejected_length"] for r in rows)
    assert first["rollout/entropy"] == pytest.approx(entropy)
    warned = [w for w in lines_of(tmp_path, "warning") if w["guard"] == "reference_not_finite"]
    assert [w["iteration"] for w in warned] == [0, 1]


def test_a_batch_without_any_is_a_skipped_step(workers: Any, inputs: tuple[str, str], tmp_path: Path) -> None:
    stop = {"trainer.spin.max_skipped_steps": 0}
    (result,) = workers.run(run_with_bad_scores, *inputs, str(tmp_path), indices=range(24), **stop)
    assert "The reference gives no finite log-probabilities" in result["error"]
    report = json.loads((tmp_path / "non_finite_step_0000001.json").read_text())
    assert [pair["not_finite"] for pair in report["pairs"]] == [["ref_logps_chosen"]] * 8
    assert "rollout/entropy" not in lines_of(tmp_path, "rollout")[0]


def test_the_first_step_that_is_made_has_to_be_ln_2(workers: Any, inputs: tuple[str, str], tmp_path: Path) -> None:
    wrong = {"indices": range(24), "shift": 0.3, "bad": (1, 2)}
    (result,) = workers.run(run_with_bad_scores, *inputs, str(tmp_path), **wrong)
    assert "has to be ln 2" in result["error"]
    assert [line["skipped_steps"] for line in lines_of(tmp_path, "train")] == [1, 2]
