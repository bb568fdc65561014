"""How a run is shown while it goes on: a bar in a terminal, plain lines elsewhere. Called by ``main.py``.

Everything shown comes from the status, as it would from ``kubectl get``.
"""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from finetune_api.causes import RETRY, Retry
from finetune_api.conditions import State
from finetune_api.status import FineTuneJobStatus
from finetune_operator.cluster import Object
from finetune_operator.cluster.local import Key

EVERY = 10.0
"""Seconds between two plain lines of a job that only goes on."""
QUIET = {"AttemptStarted", "Succeeded", "Failed", "Waiting", "Suspended"}
QUIET |= {str(cause) for cause, retry in RETRY.items() if retry is Retry.NEVER}
"""Events that the progress lines or the summary tell better."""
WITH_ETA = ("training", "generating", "judging")
BEFORE_STEPS = ("starting", "loading", "preparing")
AT_REST = (State.SUCCEEDED, State.FAILED, State.INVALID, State.SUSPENDED)


def phase(status: FineTuneJobStatus) -> str:
    """What the job does, in one word or two."""
    name = status.state.lower()
    if status.progress and status.state in (State.RUNNING, State.STARTING, State.RESTARTING):
        said = status.progress.phase
        if status.state == State.RUNNING or said in BEFORE_STEPS:  # else it is of the attempt before
            name = said or name
        if len(status.attempts) > 1:
            name += f" (attempt {status.attempts[-1].number})"
    return name


def figures(status: FineTuneJobStatus) -> list[str]:
    """Step, loss, speed and time left, as far as they are known; before them, what the trainer is busy with."""
    found = status.progress
    if found is None:
        return []
    if status.state not in AT_REST and found.phase in (*BEFORE_STEPS, "exporting") and found.message:
        return [found.message]
    if not found.max_steps:
        return []
    parts = [f"step {found.step}/{found.max_steps}", f"loss {found.loss}" if found.loss else ""]
    if status.state not in AT_REST:
        parts.append(f"{found.tokens_per_second} tokens/s" if found.tokens_per_second else "")
        parts.append(f"ETA {found.eta}" if found.eta and found.phase in WITH_ETA else "")
    return [part for part in parts if part]


class Plain:
    """One line for every new phase, and one every ten seconds while something changes. For logs and pipes."""

    def __init__(self, write: Callable[[str], None] = print) -> None:
        self._write = write
        self._shown: dict[Key, tuple[str, str, float]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def show(self, key: Key, status: FineTuneJobStatus) -> None:
        """Where a job stands now."""
        head, line, when = self._shown.get(key, ("", "", 0.0))
        now = time.monotonic()
        shown = "  ".join([key[1], phase(status), *figures(status)])
        if head == phase(status) and (shown == line or now - when < EVERY or status.state in AT_REST):
            return
        self._shown[key] = phase(status), shown, now
        self.say(shown)

    def told(self, event: Object) -> None:
        """An event of the operator."""
        if event["reason"] not in QUIET:
            self.say(f"{event['name']}  {event['message']}")

    def say(self, text: str) -> None:
        """A line for the user."""
        self._write(f"{time.strftime('%H:%M:%S')}  {text}")


class Terminal:
    """A line with a bar for each job, kept up to date; what happens is told above."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status: dict[Key, FineTuneJobStatus] = {}
        self._spinners: dict[Key, Spinner] = {}
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=8, transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def show(self, key: Key, status: FineTuneJobStatus) -> None:
        """Where a job stands now."""
        self._status[key] = status

    def told(self, event: Object) -> None:
        """An event of the operator."""
        if event["reason"] not in QUIET:
            style = "yellow" if event["type"] == "Warning" else "dim"
            self._console.print(Text(f"{event['name']}  {event['message']}", style=style))

    def say(self, text: str) -> None:
        """A line for the user."""
        self._console.print(Text(text))

    def _render(self) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        for key, status in self._status.items():
            spinner = self._spinners.setdefault(key, Spinner("dots"))
            found = status.progress
            total = found.max_steps if found else 0
            bar = ProgressBar(total=total or 1, completed=found.step if found else 0, width=24)
            mark = {State.SUCCEEDED: "✓", State.FAILED: "✗", State.INVALID: "✗", State.SUSPENDED: "‖"}
            sign: RenderableType = mark[State(status.state)] if status.state in AT_REST else spinner
            table.add_row(
                sign,
                Text(key[1], style="bold"),
                bar,
                found.percent if found else "",
                phase(status),
                *[Text(part, no_wrap=True) for part in figures(status)],
            )
        return table
