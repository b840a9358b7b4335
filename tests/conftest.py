from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch

# The processes that tests start inherit it: no test finds what an earlier run has tokenized.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="nemo_spin_tests_")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Checkpoints with known logits and data, beside the repository where they are at hand."""
    directory = Path(__file__).resolve().parents[2] / "shared"
    if not (directory / "checkpoints").is_dir():
        pytest.skip("no ../shared/checkpoints here")
    return directory


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes minutes comes last, so that anything else that is broken is seen before."""
    items.sort(key=lambda item: item.get_closest_marker("last") is not None)
