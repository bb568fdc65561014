"""One attempt at a run, in one process: what every kind of run shares, whether it trains or makes data.

The processes meet, claim the checkpoint folder, say what they are doing and leave a last word. ``run.py`` (``Job``) and
``making/`` (``Making``) build on it; it knows nothing of either.
"""

import json
import os
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from finetune_api.causes import Cause
from finetune_api.run import (
    ENV_CACHE,
    ENV_ENDS,
    ENV_WORK,
    EXIT_STOPPED,
    CheckpointInfo,
    OutputInfo,
    Termination,
    TrainerConfig,
)
from finetune_trainer.faults import ECHOES, diagnose, exit_code, leave_word
from finetune_trainer.logbook import Tally
from finetune_trainer.outcome import RunError
from finetune_trainer.stopping import Stop, leave
from finetune_trainer.telemetry import Pulse, Telemetry, now
from finetune_trainer.world import rank, world_size

RESULT_PATIENCE = 120.0
"""Seconds that the word of a success is tried to be kept with the checkpoints."""


def failed(error: BaseException, attempt: "Attempt | None") -> int:
    """Leave the last word of a failure; its exit code."""
    phase, batch = (attempt.doing, attempt.memory_settings()) if attempt else ("", "")
    cause, message = diagnose(error, phase=phase, batch=batch)
    if not isinstance(error, RunError) and cause not in ECHOES:
        traceback.print_exception(error)
    print(f"{cause}: {message}", file=sys.stderr, flush=True)
    word = attempt.word(cause, message) if attempt else Termination(cause=cause, message=message[:2000], rank=rank())
    code = word.exit_code = exit_code(cause)
    leave_word(word)
    if attempt is not None:
        attempt.end_attempt(word)
    return code


class Attempt:
    """A run's start, in one process."""

    def __init__(self, config: TrainerConfig, telemetry: Telemetry, stop: Stop) -> None:
        self.config = config
        self.telemetry = telemetry
        self.stop = stop
        self.doing = "starting"
        self.step = 0
        self.max_steps = 0
        self.loss: float | None = None
        self.tally = Tally()
        self.last_checkpoint: CheckpointInfo | None = None
        self.kept: list[CheckpointInfo] = []
        self.outputs: list[OutputInfo] = []
        self.unhealthy: dict[str, str] | None = None
        self.fence: Any = None
        self.work = Path(os.environ.get(ENV_WORK) or tempfile.mkdtemp(prefix="finetune-"))
        self.cache = Path(os.environ.get(ENV_CACHE) or self.work / "cache")
        telemetry.metrics.info(config.stage, config.method.type, config.model.uri, world_size())

    def run(self) -> int:
        """To its end; the exit code."""
        raise NotImplementedError

    def refuse(self) -> None:
        """Raise RunError where it is plain already that the run cannot go on: now that its inputs are known, and before
        anything is loaded. Rank 0 only."""

    def meet(self) -> None:
        """Model and data come to this node, the processes meet, and the checkpoint folder is this attempt's."""
        from finetune_trainer.fetch import fetch

        # Before anything heavy: a wrong URI is told within a second. Processes of a node take turns by file locks.
        self._phase("loading", f"fetching {self.config.model.uri} and the data")
        self.fetched = fetch(self.config, self.cache)
        if rank() == 0:
            self.refuse()
        self._phase("loading", "loading the libraries")
        from finetune_trainer.world import join

        self.world = join(self.config.accelerator)
        quiet()
        from finetune_trainer import earlier
        from finetune_trainer.fence import claim
        from finetune_trainer.storage import Store

        config = self.config = earlier.settled(self.config, self.fetched)
        self.world.alive = self.stop.beat
        self.pulse = Pulse(
            self.world.clone().store, self.world.rank, self.world.size, lambda: self.stop.beats, self._lost
        )
        if self.world.first:
            self.telemetry.watch(self.pulse.ages)
        self.telemetry.update(world_size=self.world.size)
        self.checkpoints = Store(config.checkpoint_uri)
        self.fence = self._on_first("claim", lambda: claim(self.checkpoints))
        self.fetched = self.world.in_turn("adapters", lambda: earlier.stacked(config, self.fetched))

    def _attempts(self, cause: Cause | None = Cause.SUCCEEDED, message: str = "") -> list[dict[str, Any]]:
        """Every start of this run and what became of it, as far as it was written down. ``cause``: how this one has
        ended; None: it runs."""
        try:
            attempts = list(self.fence.attempts()) if self.fence is not None else []
        except RunError:
            return []
        ends = self._ends()
        for attempt in attempts[:-1]:
            if "cause" not in attempt and (told := ends.get(str(attempt.get("attempt")))):
                attempt |= {"cause": told[0], "message": told[1]}
        if attempts and cause is not None:
            attempts[-1] |= {"cause": cause.value, "message": message or f"{self.step} steps"}
        return attempts

    @staticmethod
    def _ends() -> dict[str, list[str]]:
        """What the operator knows of earlier attempts: who was killed left no word."""
        try:
            found: dict[str, list[str]] = json.loads(os.environ.get(ENV_ENDS) or "{}")
        except ValueError:
            return {}
        return found

    # Words

    def word(self, cause: Cause, message: str) -> Termination:
        """The last word, with where the run stands."""
        return Termination(
            cause=cause,
            message=message[:2000],
            exit_code=exit_code(cause),
            rank=rank(),
            step=self.step,
            max_steps=self.max_steps,
            loss=self.loss,
            evaluation=self.tally.evaluation,
            outputs=self.outputs,
            unhealthy=self.unhealthy,
            last_checkpoint=self.last_checkpoint,
            kept=[info.step for info in self.kept],
        )

    def stopped(self, why: str) -> None:
        """From the waiting thread: the process leaves without a save."""
        self._leave_word(self.word(Cause.TERMINATED, why))

    def _leave_word(self, word: Termination) -> None:
        print(f"{word.cause}: {word.message}", flush=True)
        leave_word(word)
        self.end_attempt(word)

    def end_attempt(self, word: Termination) -> None:
        """Write the last word down beside the claim, for the report of a later attempt, and for an operator that finds
        no pod any more: for 5 s at most, and longer where it tells what was written.

        A process that dies of another one's death leaves the telling to that one, if it comes to it.
        """
        if self.fence is None or (word.cause in ECHOES and word.exit_code != EXIT_STOPPED):
            return
        writing = threading.Thread(target=self._note_end, args=(word,), daemon=True)
        writing.start()
        writing.join(RESULT_PATIENCE if word.cause is Cause.SUCCEEDED else 5.0)

    def _note_end(self, word: Termination) -> None:
        try:
            self.fence.end(word, now())
        except RunError as error:
            print(f"the last word is not kept with the checkpoints: {error.message}", file=sys.stderr, flush=True)

    def _lost(self, silent: int, seconds: float) -> None:
        """From the pulse's thread: a peer is silent, and the main thread may wait for it without end."""
        if not self.stop.busy:  # a last save is finished, or killed
            message = (
                f"Process {silent} has not been heard of for {seconds:.0f} s: it is frozen, or its node or the network "
                "to it is gone."
            )
            leave(failed(RunError(Cause.COMMUNICATION_ERROR, message), self))

    def memory_settings(self) -> str:
        """The settings that decide over memory, in words."""
        training = self.config.training
        return (
            f"per_device_train_batch_size {training.per_device_train_batch_size}, max_length "
            f"{self.config.data.max_length}, gradient_checkpointing "
            f"{str(training.gradient_checkpointing).lower()}, ZeRO stage "
            f"{self.config.deepspeed.get('zero_optimization', {}).get('stage', 0)}"
        )

    def _phase(self, phase: str, message: str = "") -> None:
        self.doing = {"loading": "loading", "preparing": "preparing the data"}.get(phase, phase)
        self.telemetry.phase(phase, message)
        self.stop.beat()

    def _print(self, text: str) -> None:
        if rank() == 0:
            print(f"{text}\n", end="", flush=True)  # one write: the saving thread prints as well

    def _on_first(self, name: str, work: Callable[[], Any]) -> Any:
        """``work`` on rank 0 only; its RunError is raised on every process. None elsewhere."""
        result, problem = None, None
        if self.world.first:
            try:
                result = work()
            except RunError as error:
                problem = [error.cause.value, error.message]
        problem = self.world.share(name, problem)
        if problem is not None:
            raise RunError(Cause(problem[0]), problem[1])
        return result


def quiet() -> None:
    """The log is for the run: no progress bars."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging

    logging.disable_progress_bar()


def device_name(device: Any) -> str:
    if device.type != "cuda":
        return "CPU"
    import torch

    return str(torch.cuda.get_device_name())


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", "transformers", "peft", "deepspeed"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
