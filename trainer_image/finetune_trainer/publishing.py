"""Report, plot and metrics of a run that has not finished, in its output: so that a run that fails, is stopped or is
killed leaves them too.

Written beside the training, by a thread of its own: the storage may be slow, and a plot takes half a second. Called by
``run.py`` on rank 0; a finished run's report is part of its result (``export.py``).
"""

import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from finetune_trainer.export import MANIFEST
from finetune_trainer.fence import Fence
from finetune_trainer.outcome import RunError
from finetune_trainer.storage import Store

FILES = ("metrics.jsonl", "loss.png", "report.html")
UNFINISHED = "unfinished"
"""The folder below the output, where an earlier run's result lies in the output itself: that stays whole until there is
another one."""
SHARE = 0.05
"""Of the time, at most, that goes into the report of a run that goes on: drawing takes the interpreter's lock."""


class Publisher:
    """Keeps the output's report up to date."""

    def __init__(self, output_uri: str, folder: Path, fence: Fence | None, draw: Callable[[Path], None]) -> None:
        """``draw`` writes the files into ``folder``; ``fence``: a writer that was overtaken publishes nothing."""
        self._store = Store(output_uri)
        self._folder, self._fence, self._draw = folder, fence, draw
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="publishing")
        self._pending: Future[None] | None = None
        self._next = 0.0
        self._below: str | None = None

    def renew(self) -> None:
        """The run has gone on. Returns at once."""
        busy = self._pending is not None and not self._pending.done()
        if not busy and time.monotonic() >= self._next:
            self._pending = self._pool.submit(self._publish)

    def end(self, seconds: float) -> None:
        """The run ends without a result: a last time, waited for so long."""
        with suppress(RuntimeError, TimeoutError):  # closed: it was about to write its result
            self._pool.submit(self._publish).result(seconds)

    def close(self) -> None:
        """The run is about to write its result: what is being published is finished first, and then nothing more."""
        self._pool.shutdown(wait=True)

    def clear(self) -> None:
        """The result is there: what was kept beside an earlier one is taken away."""
        if self._below == f"{UNFINISHED}/":
            self._store.delete(UNFINISHED)

    def _publish(self) -> None:
        began = time.monotonic()
        try:
            if self._fence is not None:
                self._fence.check()
            if self._below is None:
                self._below = f"{UNFINISHED}/" if self._finished_before() else ""
            self._folder.mkdir(parents=True, exist_ok=True)
            self._draw(self._folder)
            for name in FILES:
                if (path := self._folder / name).is_file():
                    self._store.put(f"{self._below}{name}", path)
        except RunError as error:
            print(f"the report in the output is not renewed: {error.message}", file=sys.stderr, flush=True)
        except Exception as error:  # a run goes on without its report
            traceback.print_exception(error)
        now = time.monotonic()
        self._next = now + (now - began) / SHARE

    def _finished_before(self) -> bool:
        try:
            self._store.get(MANIFEST)
        except FileNotFoundError:
            return False
        return True
