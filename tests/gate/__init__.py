"""A gate in a trainer's way: its steps wait for the test, so no test depends on how fast a machine makes them.

The trainer is the product's own. `inside/sitecustomize.py`, which only a trainer under test has on its PYTHONPATH, puts
the gate before each of its steps; where the test holds nothing back, it is open.
"""

from __future__ import annotations

import os
from pathlib import Path

INSIDE = Path(__file__).with_name("inside")
"""What the trainer has on its PYTHONPATH, first of all."""
ENV_GATES = "STEP_GATES"
"""The folder of the gates, a file for each run."""


class Gate:
    """The gate of one run, as the test has it. It is open."""

    def __init__(self, gates: Path, namespace: str, name: str) -> None:
        self._file = gates / f"{namespace}.{name}"

    def hold(self, step: int) -> None:
        """The run makes this many steps, and none after that: all is done then that belongs to the last of them.

        A run that is asked to stop is let go on, to the step boundary at which it does.
        """
        unfinished = self._file.with_suffix(".new")
        unfinished.write_text(str(step))
        unfinished.rename(self._file)

    def open(self) -> None:
        """The run goes on to its end."""
        self._file.unlink()


def environment(gates: Path, pythonpath: str) -> dict[str, str]:
    """What a trainer needs in its environment to stop at the gates of a folder."""
    return {ENV_GATES: str(gates), "PYTHONPATH": os.pathsep.join((str(INSIDE), pythonpath))}
