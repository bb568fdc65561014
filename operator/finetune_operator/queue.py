"""A keyed work queue: a key waits at most once, is worked on by one worker at a time, and comes back when told to.

Used by ``handlers.py``. The idea is client-go's workqueue; asyncio keeps it to one page.
"""

import asyncio
from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)

BACKOFF_FIRST, BACKOFF_MOST = 0.5, 60.0


class WorkQueue(Generic[Key]):
    """All methods belong to the event loop's thread."""

    def __init__(self) -> None:
        self._ready: asyncio.Queue[Key] = asyncio.Queue()
        self._waiting: set[Key] = set()
        self._working: set[Key] = set()
        self._again: set[Key] = set()
        self._timers: dict[Key, asyncio.TimerHandle] = {}
        self._failures: dict[Key, int] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, key: Key, after: float = 0.0) -> None:
        """Let the key be worked on; with ``after`` (seconds), not sooner than that, unless it is added again."""
        if after > 0:
            earlier = self._timers.pop(key, None)
            due = asyncio.get_running_loop().time() + after
            if earlier is not None:
                earlier.cancel()
                due = min(due, earlier.when())
            self._timers[key] = asyncio.get_running_loop().call_at(due, self._due, key)
            return
        if key in self._working:
            self._again.add(key)
        elif key not in self._waiting:
            self._waiting.add(key)
            self._ready.put_nowait(key)

    def _due(self, key: Key) -> None:
        self._timers.pop(key, None)
        self.add(key)

    async def get(self) -> Key:
        """The next key; it is this worker's until :meth:`done`."""
        key = await self._ready.get()
        self._waiting.discard(key)
        self._working.add(key)
        if timer := self._timers.pop(key, None):
            timer.cancel()  # it is being looked at now
        return key

    def done(self, key: Key, requeue: float | None) -> None:
        """The pass went through; ``requeue`` as the pass wants it (None: when something happens)."""
        self._failures.pop(key, None)
        self._release(key)
        if requeue is not None:
            self.add(key, max(requeue, 0.05))

    def failed(self, key: Key) -> None:
        """The pass failed: again after 0.5, 1, 2 … 60 seconds."""
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1
        self._release(key)
        self.add(key, min(BACKOFF_MOST, BACKOFF_FIRST * 2**failures))

    def _release(self, key: Key) -> None:
        self._working.discard(key)
        if key in self._again:
            self._again.discard(key)
            self.add(key)
