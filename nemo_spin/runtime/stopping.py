"""When a run ends before its last step: at a signal (preemption, Ctrl-C), or when the time that it may take is over.

The step under way is finished, a checkpoint is written, and the process ends as if it were done. A signal may reach one
process or all of them: they agree at the end of each step. A thread takes note of signals, because Python runs signal
handlers in the main thread only, which may wait in a collective for minutes: a second signal has to end it at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from signal import SIGINT, SIGTERM, SIGUSR1, Signals

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from tqdm import tqdm

from nemo_spin.runtime.collectives import device
from nemo_spin.runtime.watchdog import is_lost_peer

SIGNALS = (SIGTERM, SIGUSR1, SIGINT)
# A launcher passes on what has reached the processes as well: that is one signal, not two.
_SECONDS_OF_ONE_SIGNAL = 1.0
# Generation asks after every token: each group looks at what others know after so many, and at most so often.
_QUESTIONS_A_LOOK = 16
_SECONDS_BETWEEN_LOOKS = 1.0
_KEY = "stop"
_END = 0  # no signal has this number

# The write end of the pipe on which signals are noted, while they are.
_noting: int | None = None


class Stopping:
    """Whether the run is to end before its last step, with the same answer for every process.

    reason: why, once they have agreed; None until then.
    """

    def __init__(self, seconds: float | None = None) -> None:
        """seconds: that the run may take from now on; None for no limit."""
        self.reason: str | None = None
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._signal: int | None = None
        self._signal_came = 0.0
        self._store: dist.Store | None = None
        self._told = False
        self._questions = 0
        self._next_look = 0.0

    @property
    def asked(self) -> bool:
        """Whether the run is to end: the answer that `ask` gave last."""
        return self.reason is not None

    def ask(self) -> bool:
        """Whether the run is to end. Every process has to ask, at the same point."""
        if not self.asked:
            mine = torch.tensor([self._signal or 0, self._time_is_up()], dtype=torch.int32, device=device())
            if dist.is_initialized():
                dist.all_reduce(mine, dist.ReduceOp.MAX)
            number, time_is_up = mine.tolist()
            if number:
                self.reason = Signals(number).name
            elif time_is_up:
                self.reason = "exp_manager.max_time_per_run is up"
        return self.asked

    def interrupted(self) -> bool:
        """Whether generation is to leave off where it is; cheap enough to be asked after every token.

        Every process of a model-parallel group asks equally often. Groups hear of each other's signals within a second
        or two, where `signals` was given a store. Once it is true, so is the next `ask`, of all processes.
        """
        if not self._told:
            self._questions += 1
            if self._questions % _QUESTIONS_A_LOOK == 0:
                self._told = _any_of_group(self._knows())
        return self._told

    def _knows(self) -> bool:
        if self._signal is not None or self._time_is_up():
            return True
        if self._store is None or time.monotonic() < self._next_look:
            return False
        self._next_look = time.monotonic() + _SECONDS_BETWEEN_LOOKS
        return self._store.check([_KEY])

    def _time_is_up(self) -> bool:
        return self._deadline is not None and time.monotonic() >= self._deadline

    # ------------------------------------------------------------------------------------------ signals

    @contextmanager
    def signals(self, store: dist.Store | None = None) -> Iterator[None]:
        """Inside, the first of `SIGNALS` asks the run to end, and a second one ends the process at once, with 128 plus
        its number. Outside they do what they did before.

        A process that fails because another is gone ends by the signal that it has noted.
        store: where processes tell each other. Does nothing in a thread that is not the main one.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        global _noting
        self._store = None if store is None else store.clone()
        reading, _noting = os.pipe()
        os.set_blocking(_noting, False)
        listener = threading.Thread(
            target=self._listen, args=(reading, None if store is None else store.clone()), name="signals", daemon=True
        )
        listener.start()
        fd_before = signal.set_wakeup_fd(_noting, warn_on_full_buffer=False)
        # The handler itself has nothing to do: that there is one keeps the process alive and has the signal noted.
        before = {number: signal.signal(number, lambda signum, frame: None) for number in SIGNALS}
        lost = False
        try:
            yield
        except RuntimeError as error:
            lost = is_lost_peer(error)
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(fd_before)
            os.write(_noting, bytes([_END]))
            listener.join()
            os.close(_noting)
            os.close(reading)
            _noting = None
            if lost and self._signal is not None:
                # From a launcher that ends what is left of the run: there is nothing to wait for, and nothing to say.
                signal.raise_signal(self._signal)

    def _listen(self, reading: int, store: dist.Store | None) -> None:
        while (number := os.read(reading, 1)[0]) != _END:
            if number not in SIGNALS:
                continue
            if self._signal is None:
                self._signal_came = time.monotonic()
                self._signal = number
                self._tell(store, Signals(number).name)
            elif time.monotonic() - self._signal_came > _SECONDS_OF_ONE_SIGNAL:
                os._exit(128 + number)

    def _tell(self, store: dist.Store | None, name: str) -> None:
        """To the other processes, and to people: one of the processes that the signal has reached says so."""
        is_first = int(os.environ.get("RANK", "0")) == 0
        if store is not None:
            with suppress(RuntimeError):  # its server is gone, and with it the run
                is_first = store.add(_KEY, 1) == 1
        if is_first:
            again = "Ctrl-C again" if name == "SIGINT" else "a second signal"
            rank = f" reached rank {os.environ['RANK']}" if "RANK" in os.environ else ""
            tqdm.write(
                f"{name}{rank}: the run ends after this step, with a checkpoint; {again} ends it at once.",
                file=sys.stderr,
            )


def _any_of_group(answer: bool) -> bool:
    """Whether any process of this one's model-parallel group says yes."""
    if not parallel_state.model_parallel_is_initialized():
        return answer
    group = parallel_state.get_model_parallel_group()
    if group.size() == 1:
        return answer
    votes = torch.tensor([answer], dtype=torch.int32, device=device())
    dist.all_reduce(votes, dist.ReduceOp.MAX, group=group)
    return bool(votes)


def _finish_undisturbed() -> None:
    """In a process that is forked while signals are noted: a writer of a checkpoint, which ends by itself.

    A signal to it alone must not count as one to the run, and one to all must not keep it from writing.
    """
    if _noting is not None:
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


os.register_at_fork(after_in_child=_finish_undisturbed)
