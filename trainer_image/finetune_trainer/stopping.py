"""SIGTERM: how a run is asked to stop, and how it stops although its main thread sits in a collective.

A Python signal handler never runs while the main thread is inside gloo or NCCL. So SIGTERM is blocked in all
threads and one thread waits for it. It raises a flag which the training loop agrees on over all processes at the
next step boundary; the loop then saves and leaves. Where no boundary can come any more (a peer is dead, the main
thread hangs), the waiting thread leaves by itself. The pod's grace period is the only hard limit.
Called by ``run.py`` (install), ``engine.py`` (beat) and ``checkpoint.py`` (never_leave).
"""

import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from finetune_api.run import EXIT_STOPPED

PATIENCE = 3.0
"""Seconds without a beat after which a stop that waits for a step boundary gives up, at the least."""


class Stop:
    """The wish to stop, and the pulse of the main thread."""

    def __init__(self, on_leave: Callable[[str], None] | None = None) -> None:
        """``on_leave(why)`` is called before the process is left from the waiting thread."""
        self.on_leave = on_leave
        self.requested_at: float | None = None
        self.beats = 0
        self._last_beat = time.monotonic()
        self._intervals: deque[float] = deque(maxlen=64)
        self._stepping = False
        self._busy = 0

    def install(self) -> None:
        """Block SIGTERM and start to wait for it. Before any other thread is started: threads inherit the mask."""
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        # Forked helpers (datasets' workers) must die of SIGTERM, or their pool cannot be closed.
        os.register_at_fork(after_in_child=_unblock)
        threading.Thread(target=self._wait, name="sigterm", daemon=True).start()

    @property
    def requested(self) -> bool:
        """SIGTERM has come to this process."""
        return self.requested_at is not None

    @property
    def busy(self) -> bool:
        """In the middle of what must not be left (:meth:`never_leave`)."""
        return self._busy > 0

    def request(self) -> None:
        """As if SIGTERM had come."""
        if self.requested_at is None:
            self.requested_at = time.monotonic()

    def beat(self, *, stepping: bool | None = None) -> None:
        """The main thread went forward. ``stepping``: a step boundary lies ahead (training) or not (all else)."""
        now = time.monotonic()
        if self._stepping:
            self._intervals.append(now - self._last_beat)
        if stepping is not None:
            self._stepping = stepping
            if not stepping:
                self._intervals.clear()
        self._last_beat = now
        self.beats += 1

    @contextmanager
    def never_leave(self) -> Iterator[None]:
        """What is done inside (the last save) is finished or killed, never left."""
        self._busy += 1
        try:
            yield
        finally:
            self._busy -= 1
            self.beat()

    def patience(self) -> float:
        """Seconds without a beat that are still taken for work: three times a long recent one.

        The longest tenth is left out: the first steps are compiled, for half a minute.
        """
        longest_first = sorted(self._intervals, reverse=True)
        return max(PATIENCE, 3 * longest_first[len(longest_first) // 10]) if longest_first else PATIENCE

    def verdict(self, now: float) -> str:
        """Why the process should leave without a save, as a sentence; empty: wait on."""
        if self.requested_at is None or self._busy:
            return ""
        if not self._stepping:
            return "Stopped outside of training: every step that was done is saved."
        silence = now - max(self._last_beat, self.requested_at)
        if silence > self.patience():
            return f"Stopped without a save: no step ended within {silence:.0f} s of the request."
        return ""

    def _wait(self) -> None:
        signal.sigwait([signal.SIGTERM])
        self.request()
        print("SIGTERM: stopping at the next step boundary", flush=True)
        while not (why := self.verdict(time.monotonic())):
            time.sleep(0.05)
        self.leave(why)

    def leave(self, why: str) -> None:
        """End the process now: it was asked to, and nothing is left that must be finished."""
        try:
            if self.on_leave is not None:
                self.on_leave(why)
        finally:
            leave(EXIT_STOPPED)


def leave(code: int) -> None:
    """Exit without waiting for other threads: a thread inside a collective would be waited for without end."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _unblock() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
