"""Process groups: which GPU a process takes, and for how long communication waits."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from nemo_spin.megatron import setup


@pytest.mark.parametrize(("local_rank", "visible", "taken"), [(3, 8, 3), (3, 1, 0), (5, 4, 1)])
def test_a_process_takes_a_gpu_that_it_sees(
    monkeypatch: pytest.MonkeyPatch, local_rank: int, visible: int, taken: int
) -> None:
    """srun may show each of its tasks one GPU only, whatever the task's local rank."""
    devices: list[int] = []

    class ReachedError(Exception):
        pass

    def rendezvous(_: object) -> None:
        raise ReachedError

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    monkeypatch.setattr(setup, "rendezvous", rendezvous)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    with pytest.raises(ReachedError):
        setup.initialize(1, 1, seed=1)
    assert devices == [taken]


def test_groups_of_megatron_core_wait_as_long_as_the_whole_group() -> None:
    script = """
from datetime import timedelta
import torch
from megatron.core import parallel_state
from nemo_spin.megatron import setup
setup.initialize(1, 1, seed=1, timeout=timedelta(seconds=3001))
group = parallel_state.get_data_parallel_group()
print(group._get_backend(torch.device("cpu")).options._timeout)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "0:51:00", "whole minutes, and not less"


def test_sharded_optimizer_state_does_not_depend_on_the_cpu_backend() -> None:
    """torch's Adam is the inner optimizer on a GPU too, where neither Apex nor TransformerEngine is installed."""
    script = """
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from nemo_spin.megatron import cpu_backend, optimizer
print(cpu_backend._installed, DistributedOptimizer._get_main_param_and_optimizer_states.__module__)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "False nemo_spin.megatron.optimizer"
