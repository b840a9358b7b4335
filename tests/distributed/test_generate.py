"""`nemo-spin generate` makes the responses that training's rollouts are, in every layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from runs import make_checkpoint, make_data, training_run

COUNT = 11


@pytest.fixture(scope="module")
def inputs(workers: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    directory = str(tmp_path_factory.mktemp("inputs"))
    return workers.run(make_checkpoint, directory)[0], make_data(directory, COUNT)


@pytest.fixture(scope="module")
def rollouts(workers: Any, inputs: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> list[list[dict]]:
    """Those of two iterations between which the learning rate is too small for any weight to change."""
    run_dir = tmp_path_factory.mktemp("run")
    settings = {
        "model.optim.lr": 1e-20,
        "model.optim.sched.min_lr": 0.0,
        "trainer.spin.max_epochs": 1,
        "model.seed": 5,
        "model.spin.rollout_batch_size": 3,
        "model.spin.sampling_params.temperature": 0.8,
        "model.spin.sampling_params.top_k": 12,
        "model.global_batch_size": 4,
    }
    workers.run(training_run, *inputs, str(run_dir), **settings)
    tables = [pq.read_table(run_dir / "rollouts" / f"iteration-{i:03d}") for i in range(2)]
    return [sorted(table.to_pylist(), key=lambda row: row["index"]) for table in tables]


def generated(checkpoint: str, prompts: str, output: str, **changes: Any) -> list[dict[str, Any]]:
    """Two samples per prompt; other batch sizes than in training."""
    import torch.distributed as dist
    from omegaconf import OmegaConf

    from nemo_spin.commands.generate import GenerateConfig, preflight, respond
    from nemo_spin.config import LengthParams, SamplingParams
    from nemo_spin.megatron import setup
    from nemo_spin.model import MegatronGPTSPINModel

    tp, pp = setup.layout()
    layout = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, "precision": "32"}
    options = {
        "rollout_batch_size": 2,
        "micro_batch_size": 5,
        "num_samples": 2,
        "seed": 5,
        "iteration": 0,
        "sampling": SamplingParams(
            use_greedy=False, temperature=0.8, top_k=12, top_p=1.0, repetition_penalty=1.0, end_strings=()
        ),
        "lengths": LengthParams(max_length=8, min_length=1),
        "record_options": {},
        "on_bad_record": "error",
        "overwrite": False,
    }
    cfg = GenerateConfig(checkpoint=checkpoint, prompts=prompts, output=output, model=layout, **(options | changes))
    request = preflight(cfg)
    model = MegatronGPTSPINModel.restore_from(checkpoint, override_config_path=OmegaConf.create(layout))
    respond(model, cfg, request, is_main=dist.get_rank() == 0)
    dist.barrier()
    return [json.loads(line) for line in Path(output).read_bytes().splitlines()]


@pytest.mark.parametrize(
    ("layout", "iteration"),
    [({}, 0), ({"tp": 2}, 1), ({"pp": 2}, 0), ({"dp": 2}, 1)],
    ids=["single", "tp2", "pp2", "dp2"],
)
def test_sample_0_is_the_rollout_of_training(
    workers: Any,
    inputs: tuple[str, str],
    rollouts: list[list[dict]],
    tmp_path: Path,
    layout: dict[str, int],
    iteration: int,
) -> None:
    lines = workers.run(generated, *inputs, str(tmp_path / "out.jsonl"), iteration=iteration, **layout)[0]
    assert [(line["id"], line["sample"]) for line in lines] == [(i, j) for i in range(COUNT) for j in range(2)]
    first, second = lines[::2], lines[1::2]
    expected = rollouts[iteration]
    assert [line["response_ids"] for line in first] == [row["rejected_ids"] for row in expected]
    assert [line["finish_reason"] for line in first] == [row["finish_reason"] for row in expected]
    assert [line["logp"] for line in first] == pytest.approx([row["ref_rejected_logps"] for row in expected], rel=1e-4)
    assert [line["response_ids"] for line in second] != [line["response_ids"] for line in first]
    assert {line["finish_reason"] for line in lines} == {"stop", "length"}
    for line in lines:
        assert line["num_tokens"] == len(line["response_ids"]) <= 8


def test_what_is_missing_is_made_as_if_nothing_were(workers: Any, inputs: tuple[str, str], tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    whole = workers.run(generated, *inputs, str(output))[0]
    lines = output.read_bytes().splitlines(keepends=True)
    # Lines of another order, some lost, the last one unfinished.
    output.write_bytes(b"".join([lines[5], lines[2], lines[9], lines[0][:-9]]))
    again = workers.run(generated, *inputs, str(output), tp=2)[0]
    assert [line["response_ids"] for line in again[:3]] == [whole[i]["response_ids"] for i in (5, 2, 9)]
    by_key = {(line["id"], line["sample"]): line for line in again}
    assert len(again) == len(by_key) == len(whole)
    for line in whole:
        found = by_key[line["id"], line["sample"]]
        assert found | {"logp": 0} == line | {"logp": 0}
        assert found["logp"] == pytest.approx(line["logp"], rel=1e-4)
