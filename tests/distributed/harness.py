"""Worker processes for distributed tests: started once, they run many tests, at any world size up to their number.

A test hands `Workers.run` a module-level function; every rank calls it inside its own gloo process group, laid out as
`tp` x `pp` (the rest is data parallel), and what it returns comes back as a list by rank.
"""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import queue
import signal
import sys
import tempfile
import traceback
import types
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# A few threads are left behind by every training run.
_TASKS_OF_A_POOL = 200


def _work(tasks: Any, results: Any) -> None:
    os.setsid()  # its own group: what megatron-core starts beside it can be ended with it
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path[:0] = [str(HERE), str(HERE.parent.parent)]
    import warnings

    warnings.filterwarnings("ignore")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    models = _weak_references_to_models()
    while (task := tasks.get()) is not None:
        function, args, kwargs, rank, world_size, tp, pp, store_path = task
        try:
            from nemo_spin.megatron import setup

            store = dist.FileStore(store_path, world_size)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
            setup.initialize(tp, pp, seed=1234)
            results.put((rank, True, function(*args, **kwargs)))
            dist.barrier()
        except BaseException:
            results.put((rank, False, traceback.format_exc()))
        finally:
            setup.shutdown()
            _let_go_of(models)


def _weak_references_to_models() -> list[weakref.ref]:
    """A list to which every model that is wrapped for training is added."""
    from megatron.core.distributed import DistributedDataParallel

    found: list[weakref.ref] = []
    wrap = DistributedDataParallel.__init__

    def wrap_and_note(self: Any, *args: Any, **kwargs: Any) -> None:
        wrap(self, *args, **kwargs)
        found.append(weakref.ref(self))

    DistributedDataParallel.__init__ = wrap_and_note
    return found


def _let_go_of(models: list[weakref.ref]) -> None:
    """Free what a task has left of its models, and with them their process groups.

    megatron-core hangs hooks that know the model on autograd's nodes, a circle that Python's collector does not see.
    Left alone, gloo's threads of all groups there ever were wake up all the time, and have the machine for themselves.
    """
    while models:
        if (model := models.pop()()) is not None:
            for cell in gc.get_referrers(model):
                if isinstance(cell, types.CellType):
                    cell.cell_contents = None
    gc.collect()


class Workers:
    """A pool of processes, one per rank: slow to start (megatron-core's import), so shared by the test session."""

    def __init__(self, timeout: float = 300.0) -> None:
        self.timeout = timeout
        self._context = multiprocessing.get_context("spawn")
        self._processes: list[Any] = []
        self._tasks: list[Any] = []
        self._results = self._context.Queue()
        self._directory = tempfile.TemporaryDirectory()
        self._stores = itertools.count()

    def _start(self, world_size: int) -> None:
        while len(self._processes) < world_size:
            tasks = self._context.Queue()
            process = self._context.Process(target=_work, args=(tasks, self._results), daemon=False)
            process.start()
            self._tasks.append(tasks)
            self._processes.append(process)

    def run(self, function: Callable, *args: Any, tp: int = 1, pp: int = 1, dp: int = 1, **kwargs: Any) -> list[Any]:
        """Call `function(*args, **kwargs)` on tp * pp * dp ranks; raises AssertionError with the worker's traceback."""
        world_size = tp * pp * dp
        number = next(self._stores)
        if number % _TASKS_OF_A_POOL == _TASKS_OF_A_POOL - 1:
            self.stop()
        self._start(world_size)
        store = str(Path(self._directory.name) / f"store-{number}")
        for rank in range(world_size):
            self._tasks[rank].put((function, args, kwargs, rank, world_size, tp, pp, store))
        returned: dict[int, Any] = {}
        for _ in range(world_size):
            try:
                rank, ok, value = self._results.get(timeout=self.timeout)
            except queue.Empty:
                self.stop()
                raise AssertionError(f"no answer from some rank within {self.timeout} s") from None
            if not ok:
                # The other ranks may wait in a collective for the one that failed: a fresh pool serves the next test.
                self.stop()
                raise AssertionError(f"rank {rank} failed:\n{value}")
            returned[rank] = value
        return [returned[rank] for rank in range(world_size)]

    def stop(self) -> None:
        for process in self._processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()
        self._processes, self._tasks = [], []
        self._results = self._context.Queue()
