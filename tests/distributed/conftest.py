from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit" / "model_io"))

from harness import Workers

_pools: list[Workers] = []


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    pool = Workers()
    _pools.append(pool)
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def inputs(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A checkpoint and training data for `runs.training_run`."""
    from runs import make_checkpoint, make_data

    directory = str(tmp_path_factory.mktemp("inputs"))
    return workers.run(make_checkpoint, directory)[0], make_data(directory)


@pytest.fixture(scope="session")
def uninterrupted(
    workers: Workers, inputs: tuple[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    from runs import finish, training_run

    run_dir = tmp_path_factory.mktemp("uninterrupted")
    return finish(workers.run(training_run, *inputs, str(run_dir), tp=2)) | {"run_dir": run_dir}


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(nextitem: pytest.Item | None) -> None:
    """Workers are never quite idle: they do not outlast the tests of this directory."""
    if nextitem is None or Path(__file__).parent not in nextitem.path.parents:
        for pool in _pools:
            pool.stop()
