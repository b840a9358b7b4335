"""What processes tell each other; one that is alone tells nobody."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from nemo_spin.errors import UserError
from nemo_spin.runtime import collectives


def values_of_all() -> tuple[Any, ...]:
    rank = dist.get_rank()
    return collectives.gathered(rank), collectives.from_first(rank), collectives.of_first(lambda: f"made by {rank}")


def test_all_processes_get_the_same(workers: Any) -> None:
    assert workers.run(values_of_all, tp=2, pp=2) == [([0, 1, 2, 3], 0, "made by 0")] * 4


def values_without_a_collective() -> tuple[Any, ...]:
    silent = dict.fromkeys(("broadcast_object_list", "all_gather_object"), mock.DEFAULT)
    with mock.patch.multiple(dist, **silent) as collectives:
        values = values_of_all()
    return (*values, sum(collective.call_count for collective in collectives.values()))


def test_a_process_alone_keeps_its_objects_to_itself(workers: Any) -> None:
    """gloo copies large ones in a thread that opens a pool of OpenMP threads: every later operation is slower."""
    assert workers.run(values_without_a_collective) == [([0], 0, "made by 0", 0)]


def error_of_the_first() -> str:
    def make() -> None:
        raise UserError(f"process {dist.get_rank()} cannot")

    with pytest.raises(UserError) as raised:
        collectives.of_first(make)
    return str(raised.value)


@pytest.mark.parametrize("tp", [1, 2])
def test_an_error_of_the_first_process_is_raised_on_all(workers: Any, tp: int) -> None:
    assert workers.run(error_of_the_first, tp=tp) == ["process 0 cannot"] * tp
