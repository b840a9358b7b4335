from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Checkpoints with known logits and data, beside the repository where they are at hand."""
    directory = Path(__file__).resolve().parents[2] / "shared"
    if not (directory / "checkpoints").is_dir():
        pytest.skip("no ../shared/checkpoints here")
    return directory
