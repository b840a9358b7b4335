"""Processes of one attempt find each other in a store that holds what an earlier attempt has left."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from nemo_spin.runtime.rendezvous import agreed_name

SOON = timedelta(seconds=60)


@pytest.fixture
def attempt() -> Callable[..., list[str]]:
    """A function that lets these ranks agree, started in the given order, on a store that stays."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def attempt(*ranks: int, world_size: int = 3) -> list[str]:
        with ThreadPoolExecutor(world_size) as pool:
            answers = [pool.submit(agreed_name, store.clone(), rank, world_size, SOON) for rank in ranks]
            return [answer.result(timeout=60) for answer in answers]

    return attempt


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_every_attempt_has_a_name_of_its_own(attempt: Callable[..., list[str]], order: tuple[int, ...]) -> None:
    names = [set(attempt(*order)) for _ in range(3)]
    assert [len(name) for name in names] == [1, 1, 1]
    assert len(set.union(*names)) == 3


def test_who_does_not_come_is_named() -> None:
    with pytest.raises(dist.DistError, match=r"ranks \[1\]"):
        agreed_name(dist.HashStore(), 0, 2, timedelta(seconds=0.2))
