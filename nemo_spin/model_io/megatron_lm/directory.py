"""Directories of Megatron-LM and Megatron-Bridge: which iteration counts, and the files beside its weights.

ROOT/latest_checkpointed_iteration.txt    "1000", or "release" for weights without a run
ROOT/latest_train_state.pt                Megatron-Bridge's; it wins over the text file there
ROOT/iter_0001000/ or ROOT/release/       the weights; common.pt, or run_config.yaml, train_state.pt, tokenizer/
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from nemo_spin.errors import CheckpointError
from nemo_spin.megatron.architecture import Architecture
from nemo_spin.model_io.megatron_lm.args import to_args
from nemo_spin.model_io.megatron_lm.bridge import to_run_config
from nemo_spin.model_io.megatron_lm.tokenizer import to_megatron

TRACKER = "latest_checkpointed_iteration.txt"
RUN_CONFIG = "run_config.yaml"
RELEASE = "release"
_TRAIN_STATE = "train_state.pt"
_ITERATION = re.compile(r"iter_(\d+)")
# Megatron-Bridge looks for iter_* only, and older releases of Megatron-LM take no iteration 0.
WRITTEN_ITERATION = 1


@dataclass(frozen=True)
class Iteration:
    """path: the directory with the weights. notice: a sentence for the user where it was chosen, else None."""

    path: Path
    notice: str | None = None


def find_iteration(path: Path) -> Iteration | None:
    """The iteration that a path means: the directory itself, or the one that the run's tracker names.

    Where the tracker's is not whole, the newest whole one; None where the path is no directory of Megatron's. An
    iteration is whole when megatron-core wrote its metadata.json, which it does last.
    Raises CheckpointError if no iteration is whole, or if they are in a format that cannot be read.
    """
    if _number(path.resolve()) is not None or (path / RUN_CONFIG).is_file() or _is_whole(path):
        _refuse_format(path)
        if not _is_whole(path):
            raise CheckpointError(
                f"{path} was not written to its end: its metadata.json is missing; use another iteration, or copy it "
                "again."
            )
        return Iteration(path)
    candidates = {number: each for each in path.iterdir() if each.is_dir() and (number := _number(each)) is not None}
    named = _tracked(path)
    if not candidates and named is None:
        return None
    if named is not None and named in candidates:
        _refuse_torch_format(candidates[named])
        if _is_whole(candidates[named]):
            others = f" (of {len(candidates)})" if len(candidates) > 1 else ""
            return Iteration(candidates[named], f"{candidates[named].name} is used{others}: {TRACKER} names it.")
    whole = {number: each for number, each in candidates.items() if _is_whole(each)}
    if not whole:
        for each in candidates.values():
            _refuse_format(each)
        raise CheckpointError(
            f"{path} holds no whole iteration: {_reason(named, candidates)}, and no other is there; copy it again or "
            "use another checkpoint."
        )
    chosen = whole[max(whole)]
    return Iteration(
        chosen, f"{chosen.name} is used, the newest of {len(whole)} whole in {path}: {_reason(named, candidates)}."
    )


def _number(path: Path) -> int | None:
    """Of an iteration's directory its number; that of weights without a run comes before all others."""
    if path.name == RELEASE:
        return -1
    found = _ITERATION.fullmatch(path.name)
    return int(found[1]) if found else None


def _tracked(root: Path) -> int | None:
    try:
        with open(root / TRACKER, "rb") as opened:
            text = opened.read(32).decode("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    if text == RELEASE:
        return -1
    return int(text) if text.isdecimal() else None


def _reason(named: int | None, candidates: dict[int, Path]) -> str:
    if named is None:
        return f"{TRACKER} is missing or names none"
    name = RELEASE if named < 0 else f"iter_{named:07d}"
    return f"{name}, which {TRACKER} names, is {'incomplete' if named in candidates else 'not there'}"


def _is_whole(iteration: Path) -> bool:
    if not (iteration / "metadata.json").is_file():
        return False
    # The zarr layout of 2024 has a directory for each tensor instead.
    return (iteration / ".metadata").is_file() or any(iteration.glob("*/.zarray"))


def _refuse_torch_format(iteration: Path) -> None:
    if any(iteration.glob("mp_rank_*")):
        raise CheckpointError(
            f"{iteration} is in Megatron-LM's torch format (mp_rank_*), a file for each rank: convert it by starting "
            "the run that wrote it once more with --ckpt-convert-format torch_dist --ckpt-convert-save DIRECTORY."
        )


def _refuse_format(iteration: Path) -> None:
    _refuse_torch_format(iteration)
    names = {each.name for each in iteration.iterdir()}
    if ".metadata" in names and not names & {"metadata.json", "common.pt"}:
        raise CheckpointError(
            f"{iteration} is in the format torch_dcp or fsdp_dtensor, or it was not written to its end: convert it "
            "with Megatron-LM's tools/checkpoint/checkpoint_inspector.py convert-fsdp-dtensor-to-torch-dist, or train "
            "with --ckpt-format torch_dist."
        )


def iteration_directory(root: Path) -> Path:
    """Where `write_megatron_directory` expects the weights, under names without a prefix."""
    return root / f"iter_{WRITTEN_ITERATION:07d}"


def write_megatron_directory(
    root: Path,
    architecture: Architecture,
    dtype: torch.dtype,
    tokenizer: tuple[str, str] | None = None,
    final_root: Path | None = None,
) -> None:
    """Write what Megatron-LM and Megatron-Bridge read beside the weights.

    root: the weights are in `iteration_directory(root)`. dtype: theirs. tokenizer: its library, and the place of its
    files in the iteration ("tokenizer" or "tokenizer/tokenizer.model"). final_root: where root will be renamed to: both
    readers take paths as they are written, not relative to the checkpoint.
    """
    iteration = iteration_directory(root)
    fields: dict[str, Any] | None = None
    if tokenizer is not None:
        library, place = tokenizer
        fields = to_megatron(library, str(iteration_directory((final_root or root).absolute()) / place))
    args = argparse.Namespace(**to_args(architecture, dtype), **(fields or {}), iteration=WRITTEN_ITERATION)
    torch.save({"args": args, "checkpoint_version": 3.0, "iteration": WRITTEN_ITERATION}, iteration / "common.pt")
    (iteration / RUN_CONFIG).write_text(yaml.safe_dump(to_run_config(architecture, dtype, fields)))
    for file in (iteration / _TRAIN_STATE, root / f"latest_{_TRAIN_STATE}"):
        torch.save(_train_state(), file)
    (root / TRACKER).write_text(str(WRITTEN_ITERATION))


def _train_state() -> dict[str, torch.Tensor]:
    """Megatron-Bridge's TrainState of a run that has seen nothing yet."""
    counts = ("consumed_train_samples", "skipped_train_samples", "consumed_valid_samples")
    return {
        "step": torch.tensor(WRITTEN_ITERATION),
        **{name: torch.tensor(0) for name in counts},
        "floating_point_operations_so_far": torch.tensor(0.0, dtype=torch.float64),
        **{name: torch.tensor(False) for name in ("do_train", "do_valid", "do_test")},
    }
