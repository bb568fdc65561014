"""Imported by Python itself when a trainer under test starts: puts the gate of `tests/gate` before its steps."""

import contextlib
import importlib.util
import os
import sys
import time
from functools import wraps
from pathlib import Path


def held(gate, step):
    """Whether the test lets no step of this number begin."""
    with contextlib.suppress(FileNotFoundError):
        return step > int(gate.read_text())
    return False


def put_before_steps(engine):
    """``Engine.step`` waits; the other threads go on and tell of the run."""
    make_step = engine.Engine.step

    @wraps(make_step)
    def step(self, batch, *arguments, **options):
        waited = False
        gate = Path(os.environ["STEP_GATES"]) / f"{self.config.namespace}.{self.config.name}"
        while held(gate, batch.step) and not self.stop.requested:
            time.sleep(0.02)
            waited = True
        if waited:
            self.stop.beat()  # the step itself has not begun to take time
        return make_step(self, batch, *arguments, **options)

    engine.Engine.step = step


class AfterImport:
    """A finder that is asked for the engine once, and adds the gate to what is found."""

    def find_spec(self, name, path=None, target=None):
        if name != "finetune_trainer.engine":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            put_before_steps(module)

        spec.loader.exec_module = exec_module
        return spec


if "STEP_GATES" in os.environ:
    sys.meta_path.insert(0, AfterImport())
