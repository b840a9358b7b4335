"""The end of a run with save_best_model: the weights of the best checkpoint, bit for bit, in any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import finish, training_run

from nemo_spin.checkpoint.manifest import digest_of

ONE_ITERATION = {
    "trainer.spin.max_epochs": 1,
    "trainer.spin.max_iterations": 1,
    "model.spin.replay_iterations": 0,
    "model.spin.ref_policy_kl_penalty": 0.5,
    "model.optim.lr": 1e-3,
}
# the second iteration has a lower val_loss than the first, so that by "max" the first is the best
TWO_ITERATIONS = ONE_ITERATION | {
    "trainer.spin.max_iterations": 2,
    "model.data.validation_ds.file_path": "the training data, as tests do",
    "exp_manager.checkpoint_callback_params.save_best_model": True,
    "exp_manager.checkpoint_callback_params.mode": "max",
}
FIRST, SECOND = "iteration-001-step-0000003", "iteration-002-step-0000006"


def layout(tp: int, pp: int, precision: str | int) -> dict[str, Any]:
    sizes = {"model.tensor_model_parallel_size": tp, "model.pipeline_model_parallel_size": pp}
    return sizes | {"trainer.precision": precision}


def settle(cfg: Any, model: Any, trainer: Any) -> list[str]:
    """What is said, in the end."""
    from nemo_spin.commands.best_iteration import settle_on_best

    said: list[str] = []
    trainer.reporter.say = said.append
    settle_on_best(cfg.checkpoint, model, trainer)
    return said


def settle_on_what_is_damaged(cfg: Any, model: Any, trainer: Any) -> list[str]:
    if torch.distributed.get_rank() == 0:
        file = next((trainer.checkpoints.directory / FIRST / "shards").glob("*.distcp"))
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    torch.distributed.barrier()
    return settle(cfg, model, trainer)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(("tp", "pp", "precision"), [(1, 1, 32), (2, 2, "bf16")], ids=["alone", "tp2 pp2 bf16"])
def test_the_weights_are_those_of_the_best_checkpoint(
    workers: Any, inputs: tuple[str, str], tmp_path: Path, tp: int, pp: int, precision: str | int
) -> None:
    at = {"tp": tp, "pp": pp}
    same_layout = layout(tp, pp, precision)
    first = finish(workers.run(training_run, *inputs, str(tmp_path / "1"), **ONE_ITERATION | same_layout, **at))
    last = finish(workers.run(training_run, *inputs, str(tmp_path / "2"), **TWO_ITERATIONS | same_layout, **at))
    checkpoints = tmp_path / "2" / "checkpoints"
    files = {path: digest_of(path) for path in checkpoints.rglob("*") if path.is_file()}
    # a run that is at its end already, as after an export that was interrupted
    best = finish(
        workers.run(
            training_run, *inputs, str(tmp_path / "2"), resume=True, at_end=settle, **TWO_ITERATIONS | same_layout, **at
        )
    )
    assert same(best["weights"], first["weights"]) and not same(best["weights"], last["weights"])
    chosen, written = best["ended"]
    assert "after iteration 0" in chosen or "SFT model itself" in chosen
    assert "the highest of SFT model" in chosen and f"checkpoints/{FIRST}" in chosen
    assert f"after iteration 0, the best ones ({checkpoints / FIRST}), and not the last" in written
    assert {path: digest_of(path) for path in checkpoints.rglob("*") if path.is_file()} == files


def test_a_damaged_checkpoint_is_passed_over_for_the_next_best(
    workers: Any, inputs: tuple[str, str], tmp_path: Path
) -> None:
    run = finish(
        workers.run(
            training_run,
            *inputs,
            str(tmp_path),
            at_end=settle_on_what_is_damaged,
            **TWO_ITERATIONS | layout(2, 1, 32),
            tp=2,
        )
    )
    _, damaged, written = run["ended"]
    assert damaged.startswith(f"warning: {tmp_path / 'checkpoints' / FIRST} is damaged (shards/")
    assert damaged.endswith("it is passed over for the next best.")
    assert written == "What is written are the weights after iteration 1, which are the last ones."
