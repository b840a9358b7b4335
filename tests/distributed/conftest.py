from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit" / "checkpoint"))

from harness import Workers

_pools: list[Workers] = []


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    pool = Workers()
    _pools.append(pool)
    yield pool
    pool.stop()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(nextitem: pytest.Item | None) -> None:
    """Workers are never quite idle: they do not outlast the tests of this directory."""
    if nextitem is None or Path(__file__).parent not in nextitem.path.parents:
        for pool in _pools:
            pool.stop()
