"""Which iteration is said to be the best, with which figures, and when that is to be taken with caution."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from nemo_spin.checkpoint.run_state import Stored
from nemo_spin.commands.best_iteration import _sft_value, best_in_words, figures_of
from nemo_spin.config import parse_config
from nemo_spin.errors import ConfigError
from nemo_spin.runtime.progress import Progress


def stored(step: int, iteration: int, iteration_step: int = 0, monitor: str = "val_loss", **more: Any) -> Stored:
    value = more.pop("value", None)
    metrics = {} if value is None else {monitor: value}
    name = f"iteration-{iteration:03d}-step-{step:07d}" + more.pop("suffix", "")
    values = {"settings": {}, "with_reference": False, "keep": True, "serial": 0, "ref_id": ""} | more
    return Stored(Path("run/checkpoints") / name, Progress(iteration, iteration_step, step), metrics=metrics, **values)


ENDS = [stored(40, 1, value=1.25), stored(80, 2, value=1.2345), stored(120, 3, value=1.24)]


def words(checkpoints: list[Stored], sft: float | None = None, monitor: str = "val_loss", mode: str = "min") -> str:
    return best_in_words(figures_of(checkpoints, monitor, sft), monitor, mode)


def test_the_best_iteration_is_named_with_all_figures() -> None:
    assert words(ENDS[::-1], 1.3) == (
        "Best val_loss: 1.2345 after iteration 1 (checkpoints/iteration-002-step-0000080), the lowest of "
        "SFT model 1.3000, iteration 0 1.2500, iteration 1 1.2345, iteration 2 1.2400."
    )
    # after a resume the SFT model's may not be known
    assert "the lowest of iteration 0 1.2500, iteration 1" in words(ENDS)
    assert words(ENDS[:1]) == "Best val_loss: 1.2500 after iteration 0 (checkpoints/iteration-001-step-0000040)."
    assert words([stored(40, 1)], 1.3) == "" == words([stored(40, 1, value=math.nan)], 1.3)


def test_it_is_said_plainly_where_no_iteration_has_improved_on_the_sft_model() -> None:
    assert words(ENDS, 1.2) == (
        "Best val_loss: 1.2000, of the SFT model itself, the lowest of SFT model 1.2000, iteration 0 1.2500, iteration "
        "1 1.2345, iteration 2 1.2400: by this figure no iteration has improved on it, and the best checkpoint is that "
        "of iteration 1 (checkpoints/iteration-002-step-0000080)."
    )
    assert "SFT model itself" in words(ENDS, 1.2345) and "SFT model itself" not in words(ENDS, 1.2346)


def test_the_highest_is_best_where_it_is_asked_for() -> None:
    assert words(ENDS, 1.3, mode="max").startswith("Best val_loss: 1.3000, of the SFT model itself, the highest of")
    assert words(ENDS, mode="max").startswith("Best val_loss: 1.2500 after iteration 0 ")


def test_of_checkpoints_within_iterations_only_the_best_is_listed() -> None:
    within = [stored(60, 1, 20, value=1.1), stored(20, 0, 20, value=1.28)]
    assert words([*ENDS, *within], 1.3) == (
        "Best val_loss: 1.1000 after step 60 of iteration 1 (checkpoints/iteration-001-step-0000060), the lowest of "
        "SFT model 1.3000, iteration 0 1.2500, step 60 of iteration 1 1.1000, iteration 1 1.2345, iteration 2 1.2400."
    )


def test_a_run_that_ended_within_an_iteration_lists_its_end() -> None:
    said = words([*ENDS[:1], stored(60, 1, 20, value=1.3, keep=False), stored(50, 1, 10, value=1.4, keep=False)])
    assert said.endswith("the lowest of iteration 0 1.2500, step 60 of iteration 1 1.3000.")


def test_of_equals_the_earlier_is_best_and_of_one_place_the_later_checkpoint_counts() -> None:
    twice = [stored(40, 1, value=1.0), stored(40, 1, value=1.0, serial=3, suffix="-2"), stored(80, 2, value=1.0)]
    assert words(twice).startswith("Best val_loss: 1.0000 after iteration 0 (checkpoints/iteration-001-step-0000040-2)")


@pytest.mark.parametrize("monitor", ["val/loss", "val/rewards/margins", "val/rewards/accuracies"])
def test_what_compares_each_policy_with_its_own_opponent_comes_with_a_caution(monitor: str) -> None:
    said = words([stored(40, 1, monitor=monitor, value=0.7)], monitor=monitor, mode="max")
    assert "compares each policy with its own opponent" in said
    assert "opponent" not in words(ENDS)


def test_the_figure_of_the_sft_model_is_in_the_log(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    assert _sft_value(log, "val_loss") is None
    lines = [
        {"kind": "validation", "step": 0, "iteration": 0, "val_loss": 9.0},  # of a start before the one that counts
        {"kind": "start", "step": 0, "iteration": 0},
        {"kind": "validation", "step": 0, "iteration": 0, "val_loss": 1.5},
        {"kind": "validation", "step": 3, "iteration": 0, "val_loss": 1.25},
        {"kind": "resume", "step": 3, "iteration": 0},
    ]
    log.write_text("".join(json.dumps({"time": 0.0} | line) + "\n" for line in lines))
    assert _sft_value(log, "val_loss") == 1.5
    assert _sft_value(log, "val/loss") is None
    log.write_text("no line of a log\n{}\n")
    assert _sft_value(log, "val_loss") is None


def test_the_best_model_is_refused_where_nothing_tells_which_it_is() -> None:
    def config(validation: str | None, **loop: Any) -> dict[str, Any]:
        return {
            "trainer": {"devices": 1, "spin": loop},
            "exp_manager": {"explicit_log_dir": "run", "checkpoint_callback_params": {"save_best_model": True}},
            "pretrained_checkpoint": {"restore_from_path": "sft.nemo"},
            "model": {
                "global_batch_size": 4,
                "spin": {"ref_policy_kl_penalty": 0.1},
                "optim": {"lr": 1e-6},
                "data": {"train_ds": {"file_path": "train.jsonl"}, "validation_ds": {"file_path": validation}},
            },
        }

    assert parse_config(config("held_out.jsonl")).checkpoint.save_best_model
    for refused, reason in (
        (config(None), "validation_ds.file_path is null"),
        (config("held_out.jsonl", limit_val_batches=0), "limit_val_batches = 0"),
    ):
        with pytest.raises(ConfigError, match=f"save_best_model needs validation .*{reason}") as raised:
            parse_config(refused)
        assert "\n" not in str(raised.value)
