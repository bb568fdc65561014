"""Many waits at a time, and an end in good order: what is done while requests are on their way.

Called by the stages of this package, from the main thread; :meth:`Work.part` by the thread that waits for SIGTERM.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Generic, TypeVar

from finetune_trainer.stopping import Stop

T = TypeVar("T")
R = TypeVar("R")

PARTING = 10.0
"""Seconds for what is on its way when the run is asked to stop: its answers are kept."""


class Work(Generic[T, R]):
    """A function of many things, called in threads; results come as they are there."""

    def __init__(self, function: Callable[[T], R], threads: int, stop: Stop) -> None:
        self._function = function
        self._stop = stop
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="work")
        self._running: dict[Future[R], T] = {}
        self._parting = threading.Event()

    def add(self, thing: T) -> None:
        """One thing more."""
        self._go_on()
        self._running[self._pool.submit(self._function, thing)] = thing

    def done(self, *, all_of_it: bool) -> Iterator[tuple[T, R]]:
        """Results that are there; with ``all_of_it`` all, waited for. The function's own exceptions."""
        while self._running:
            ready, _ = wait(self._running, timeout=0.2 if all_of_it else 0.0, return_when=FIRST_COMPLETED)
            self._go_on()
            self._stop.beat()  # threads have timeouts of their own
            for future in ready:
                thing = self._running.pop(future)
                yield thing, future.result()
            if not ready and not all_of_it:
                return

    def part(self) -> None:
        """Begin nothing more, and wait a little for what is on its way. The process is left after this."""
        self._parting.set()
        running = list(self._running)
        self._pool.shutdown(wait=False, cancel_futures=True)
        wait([future for future in running if not future.cancelled()], timeout=PARTING)

    def close(self) -> None:
        """Nothing more will come."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _go_on(self) -> None:
        if self._parting.is_set():
            threading.Event().wait()  # for the end: the other thread leaves the process
