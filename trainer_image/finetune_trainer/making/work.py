"""Many waits at a time, and an end in good order: what is done while requests are on their way.

Called by the stages of this package, from one thread.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Generic, TypeVar

from finetune_trainer.stopping import Stop

T = TypeVar("T")
R = TypeVar("R")

PARTING = 10.0
"""Seconds for what is on its way when the run is asked to stop: its answers are kept."""


class StoppedError(Exception):
    """The run was asked to stop."""


class Work(Generic[T, R]):
    """A function of many things, called in threads; results come as they are there."""

    def __init__(self, function: Callable[[T], R], threads: int, stop: Stop) -> None:
        self._function = function
        self._stop = stop
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="work")
        self._running: dict[Future[R], T] = {}

    def add(self, thing: T) -> None:
        """One thing more."""
        self._running[self._pool.submit(self._function, thing)] = thing

    def __len__(self) -> int:
        return len(self._running)

    def done(self, *, all_of_it: bool) -> Iterator[tuple[T, R]]:
        """Results that are there; with ``all_of_it`` all, waited for. StoppedError; the function's own exceptions."""
        while self._running:
            self.check()
            ready, _ = wait(self._running, timeout=0.2 if all_of_it else 0.0, return_when=FIRST_COMPLETED)
            self._stop.beat()  # threads have timeouts of their own
            for future in ready:
                thing = self._running.pop(future)
                yield thing, future.result()
            if not ready and not all_of_it:
                return

    def check(self) -> None:
        """StoppedError where the run is to stop, after what was on its way has come or PARTING is over."""
        if not self._stop.requested:
            return
        with self._stop.never_leave():
            self._pool.shutdown(wait=False, cancel_futures=True)
            until = time.monotonic() + PARTING
            wait([future for future in self._running if not future.cancelled()], timeout=until - time.monotonic())
        raise StoppedError

    def close(self) -> None:
        """Nothing more will come."""
        self._pool.shutdown(wait=False, cancel_futures=True)
