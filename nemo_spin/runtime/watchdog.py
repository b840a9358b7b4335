"""Ends a run that stands still, or of which a process is gone, and says where and why.

A process that waits in a collective for one that never comes would wait for hours, and its message would be about the
wait. So each process has threads beside the main one: they count its `beat`s, show the count to the others, and when
nobody has moved for too long all say where they are, one prints it, and all end.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any

from nemo_spin.errors import EXIT_CODE as USER_ERROR
from nemo_spin.errors import UserError, one_line
from nemo_spin.runtime.stack import position

if TYPE_CHECKING:
    import torch.distributed as dist

# A failure that may pass, as sysexits.h has it: another try is worth while.
EXIT_CODE = 75

_INTERVAL = 5.0
# Without a sign from a process's own thread it is gone, or its machine. Long, because C code may keep Python from
# running threads: a tokenizer, a pickle.
_SECONDS_UNTIL_GONE = 300.0
# For a process to end by what went wrong in it, before it is ended because of what went wrong elsewhere.
_SECONDS_TO_END = 10.0
# What communication raises when a peer has failed.
_LOST_PEER = re.compile(r"gloo|nccl|connection (was likely )?(closed|reset)|broken pipe", re.IGNORECASE)
_DONE = "done"


class LostPeerError(Exception):
    """Another process of the run has failed. Says which, and how."""


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error is what communication raises because another process has failed."""
    return isinstance(error, RuntimeError) and _LOST_PEER.search(str(error)) is not None


class _Pulse:
    """How often the main thread has said that it goes on, and what it was about to do."""

    beats = 0
    place = "the start"


def beat(place: str | None = None) -> None:
    """The main thread goes on. place: what it does from here on, as people say it; None for the same as before."""
    _Pulse.beats += 1
    if place is not None:
        _Pulse.place = place


def communication_timeout(seconds: float) -> timedelta:
    """After which communication gives up: later than a watchdog of so many seconds, which knows more; half an hour
    without one. Longer by far, because one process may work on, with beats, while the others wait for it.
    """
    return timedelta(seconds=max(1800.0, 4 * seconds))


class Watchdog:
    """Around the work of a process: ends it when the run cannot go on. See above.

    An error that leaves the block is made known to the other processes, which end with it; what their communication
    raises because of it leaves as LostPeerError.
    """

    def __init__(
        self,
        seconds: float,
        store: dist.Store,
        rank: int = 0,
        world_size: int = 1,
        exit: Callable[[int], Any] = os._exit,
    ) -> None:
        """seconds: without a beat of any process after which the run is ended; 0 for never. store: shared by all."""
        self._seconds = seconds or math.inf
        self._until_gone = min(_SECONDS_UNTIL_GONE, self._seconds)
        self._interval = min(_INTERVAL, self._seconds / 4)
        self._store, self._thread_store = store, store.clone()
        self._rank, self._world_size, self._exit = rank, world_size, exit
        self._main = threading.current_thread()
        self._ended = threading.Event()
        self._looks = 0
        self._stuck = False
        # Two see to it, should one of them be what stands still.
        self._observers = {0, world_size - 1}
        self._seen: dict[int, tuple[list[int], list[int]]] = {}

    def __enter__(self) -> Watchdog:
        # Shown before anything can go wrong: who has not shown anything is not missed.
        self._show(self._store)
        for work in (self._watch, self._watch_the_watch):
            threading.Thread(target=work, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if isinstance(error, Exception):
            if not is_lost_peer(error):
                self._make_known(error)
            elif cause := self._cause():
                raise LostPeerError(cause) from error
        else:
            self._try(lambda: self._store.set(f"pulse/{self._rank}", _DONE))

    # ------------------------------------------------------------------------------------------ failures

    def _make_known(self, error: Exception) -> None:
        sentence = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {one_line(error)}"
        code = USER_ERROR if isinstance(error, UserError) else 1
        message = {"rank": self._rank, "sentence": sentence, "code": code}
        self._try(lambda: _tell_first(self._store, "failed", message))

    def _cause(self) -> str | None:
        failed = self._try(lambda: self._store.check(["failed"]) and json.loads(self._store.get("failed")))
        return f"rank {failed['rank']} failed: {failed['sentence']}" if failed else None

    def _try(self, message: Callable[[], Any]) -> Any:
        """None where the store is gone: then the others know already, or are gone as well."""
        try:
            return message()
        except RuntimeError:
            return None

    def _end_with(self, failed: Mapping[str, Any]) -> None:
        """Another process has failed: this one ends too, by itself where it can."""
        if self._ended.wait(_SECONDS_TO_END):
            return
        if os.environ.get("LOCAL_RANK", "0") == "0":
            _say(f"error: rank {self._rank} ends because rank {failed['rank']} failed: {failed['sentence']}")
        self._exit(failed["code"])

    # ------------------------------------------------------------------------------------------ standing still

    def _watch(self) -> None:
        try:
            while not self._ended.wait(self._interval):
                self._looks += 1
                self._look(self._thread_store)
        except RuntimeError as error:
            if self._stuck:
                self._exit(EXIT_CODE)
            # The store is kept by the first process, or by the launcher on its machine.
            if not self._ended.wait(_SECONDS_TO_END):
                reason = " ".join(str(error).splitlines()[:1])
                _say(f"error: rank {self._rank} ends because the first process, or its machine, is gone ({reason}).")
                self._exit(1)

    def _look(self, store: dist.Store) -> None:
        self._show(store)
        if store.check(["failed"]):
            self._end_with(json.loads(store.get("failed")))
        elif store.check(["stuck"]):
            self._say_where(store, json.loads(store.get("stuck")))
        elif self._rank in self._observers and (message := self._observe(store)):
            _tell_first(store, "stuck", message)

    def _show(self, store: dist.Store) -> None:
        store.set(f"pulse/{self._rank}", json.dumps([self._looks, _Pulse.beats]))

    def _observe(self, store: dist.Store) -> dict[str, Any] | None:
        """What is wrong with the run, from what all processes have shown of themselves.

        Time is counted in looks: a job that was suspended as a whole has not looked either.
        """
        keys = [f"pulse/{rank}" for rank in range(self._world_size)]
        if not store.check(keys):  # somebody has only just begun
            return None
        silent, still = {}, {}
        for rank, value in enumerate(store.multi_get(keys)):
            if value.decode() == _DONE:
                continue
            counts = json.loads(value)
            before, since = self._seen.setdefault(rank, (counts, [self._looks] * 2))
            for kind in (0, 1):
                if counts[kind] != before[kind]:
                    before[kind], since[kind] = counts[kind], self._looks
            silent[rank], still[rank] = ((self._looks - look) * self._interval for look in since)
        gone = [rank for rank, seconds in silent.items() if seconds >= self._until_gone]
        nobody_moves = bool(still) and min(still.values()) >= (self._until_gone if gone else self._seconds)
        return {"seconds": round(min(still.values())), "gone": gone} if nobody_moves else None

    def _say_where(self, store: dist.Store, stuck: Mapping[str, Any]) -> None:
        """Say where this process is; one prints what all say; then end."""
        self._stuck = True
        here = f"({_Pulse.place}): {position(self._main)}"
        store.set(f"stack/{self._rank}", here)
        if store.add("stack/printing", 1) == 1:
            answers = self._answers(store, set(range(self._world_size)) - set(stuck["gone"]))
            _say(summary(stuck["seconds"], stuck["gone"], answers, self._world_size))
            store.set("told", "")
        for _ in range(20):
            if store.check(["told"]):
                break
            time.sleep(self._interval / 2)
        time.sleep(2 * self._interval)  # the store may be kept here, and the others still have to learn of it
        self._exit(EXIT_CODE)

    def _answers(self, store: dist.Store, ranks: set[int]) -> dict[int, str]:
        """Where they are, of those who say so in time."""
        for _ in range(12):
            answered = {rank for rank in ranks if store.check([f"stack/{rank}"])}
            if answered == ranks:
                break
            time.sleep(self._interval / 4)
        return {rank: store.get(f"stack/{rank}").decode() for rank in sorted(answered)}

    def _watch_the_watch(self) -> None:
        """The store may be on a machine that is lost, and then a look at it takes hours. An orphan ends as well."""
        launcher = os.getppid() if {"TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"} & os.environ.keys() else None
        times, looks = 0, -1
        while not self._ended.wait(self._interval):
            times, looks = (times + 1, looks) if self._looks == looks else (0, self._looks)
            if times * self._interval > 2 * self._until_gone:
                _say(f"error: rank {self._rank} ends because the first process does not answer any more.")
                self._exit(EXIT_CODE)
            if launcher is not None and os.getppid() != launcher:
                _say(f"error: rank {self._rank} ends because the launcher that started it is gone.")
                self._exit(1)


def _tell_first(store: dist.Store, key: str, message: Mapping[str, Any]) -> None:
    """Leave a message, unless somebody has left one there before."""
    if store.add(f"{key}/claims", 1) == 1:
        store.set(key, json.dumps(message))


def summary(seconds: int, gone: list[int], stacks: Mapping[int, str], world_size: int) -> str:
    """For people: which ranks are where, those at the same place together. stacks: of ranks, see `stack.position`."""
    places: dict[str, list[int]] = defaultdict(list)
    for rank, place in stacks.items():
        places[place].append(rank)
    lines = [f"{_ranks(ranks)} {place}" for place, ranks in sorted(places.items(), key=lambda item: item[1])]
    if gone:
        lines.append(f"{_ranks(gone)}: no sign of life, the process has ended or its machine is gone")
    if dumb := sorted(set(range(world_size)) - set(gone) - set(stacks)):
        lines.append(f"{_ranks(dumb)}: no answer")
    head = f"error: no process has made progress for {seconds} s (trainer.spin.hang_timeout): the run is ended."
    return "\n".join([head, *(f"  {line}" for line in lines)])


def _ranks(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


def _say(message: str) -> None:
    print("\n" + message, file=sys.stderr, flush=True)
