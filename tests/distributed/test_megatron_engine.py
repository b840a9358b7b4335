"""megatron-core's dynamic engine: the tests of `test_generation.py` over again, and its responses against our engine's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import test_generation
from harness import Workers
from test_generation import *  # noqa: F403


def with_megatrons_engine(function: Callable, *args: Any, **kwargs: Any) -> Any:
    from nemo_spin.generation.megatron_engine import MegatronEngine

    with mock.patch.object(test_generation, "Generator", MegatronEngine):
        return function(*args, **kwargs)


class OverMegatronsEngine:
    """Workers that have megatron-core's engine where a test thinks it has ours."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers

    def run(self, function: Callable, *args: Any, **kwargs: Any) -> list[Any]:
        return self._workers.run(with_megatrons_engine, function, *args, **kwargs)


@pytest.fixture
def workers(workers: Workers) -> OverMegatronsEngine:
    return OverMegatronsEngine(workers)
