"""Runs that train nothing and make data: ``spec.stage`` rlaif. Called by ``run.py`` (:class:`Making`).

What they share with a training is in ``attempt.py``. A stage is a function of :data:`MAKERS`: it reads ``prompts.py``,
has models write (``writer.py``, ``endpoint.py``), keeps every answer in the ``ledger.py`` as it comes, and gives
:class:`Made`. There are no checkpoints: a later attempt asks for what the ledger does not hold.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from finetune_api.causes import Cause
from finetune_api.run import CheckpointInfo, TrainerConfig
from finetune_api.stages import STAGES
from finetune_trainer.attempt import Attempt, versions
from finetune_trainer.making.ledger import FOLDER, Ledger
from finetune_trainer.making.work import Work
from finetune_trainer.telemetry import History, now
from finetune_trainer.world import local_rank

SAID_EVERY = 10.0
"""Seconds between two lines of the log, of metrics.jsonl and of its copy in the storage."""
METRICS = f"{FOLDER}/metrics.lines"


@dataclass
class Made:
    """What a stage has made, in rank 0's hands."""

    rows: list[dict[str, Any]]
    """The output, in an order that does not depend on how it was made."""
    figures: dict[str, float]
    """For status and report."""
    sections: list[tuple[str, str]]
    """Title and HTML, for the report."""
    tiles: list[tuple[str, str]]
    beside: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Further files of rows, by name."""


def _rlaif(making: "Making") -> Made | None:
    from finetune_trainer.making import rlaif

    return rlaif.make(making)


MAKERS: dict[str, Callable[["Making"], Made | None]] = {"rlaif": _rlaif}
"""By stage. None: of processes that are not the first."""


class Making(Attempt):
    """One attempt at making data, in one process."""

    work_in_hand: Work[Any, Any] | None = None

    def run(self) -> int:
        """Load, ask, write. The exit code."""
        self.meet()
        self._open()
        made = MAKERS[self.config.stage](self)
        if made is not None:
            self._export(made)
        self._phase("done", f"done: {self.step} steps")
        if local_rank() == 0:
            told = f"Made {len(made.rows)} rows." if made is not None else "Made its share of the rows."
            self._leave_word(self.word(Cause.SUCCEEDED, told))
        self.pulse.close()
        return 0

    def _open(self) -> None:
        self.claim = int(self.world.share("writer", self.fence.number if self.world.first else None))
        self.ledger = Ledger(self.checkpoints, f"{self.claim:06d}-{self.world.rank}")
        known = self.ledger.load()
        self.history = History(self.work / f"metrics-{self.world.rank}.jsonl")
        self.seconds = 0.0
        self._known = 0
        self._counter = f"finetune/made/{self.claim}"
        self._began = self._said = time.monotonic()
        if self.world.first and known:
            self._print(f"{known} answers are there from earlier attempts")
            self._restore()

    def _restore(self) -> None:
        try:
            self.history.path.write_bytes(self.checkpoints.get(METRICS))
        except FileNotFoundError:
            return
        self.seconds = max((record.get("seconds", 0.0) for record in self.history.records()), default=0.0)

    # Where it stands

    def begin(self, steps: int, phase: str, message: str) -> None:
        """The first phase: so many steps are to be made, by all processes together."""
        self.max_steps = steps
        self.telemetry.update(max_steps=steps)
        self.telemetry.metrics.max_steps.set(steps)
        self._began = time.monotonic()
        self._phase(phase, message)

    def went_on(self, steps: int, figures: Callable[[], dict[str, float]], *, known: bool = False) -> None:
        """So many steps were made by this process, perhaps none but something else; ``known``: in earlier attempts."""
        self.stop.beat()
        self.step = int(self.world.store.add(self._counter, steps))
        if known:
            self._known += steps
        if not self.world.first:
            return
        old, spent = self._known, time.monotonic() - self._began
        new = self.step - old
        self.telemetry.metrics.step.set(self.step)
        self.telemetry.update(
            step=self.step,
            resumed_from_step=old or None,
            last_step_time=now(),
            step_seconds=spent / new if new else None,
            eta_seconds=round(spent / new * (self.max_steps - self.step), 1) if new else None,
            message=f"{self.step} of {self.max_steps}",
        )
        if time.monotonic() - self._said >= SAID_EVERY:
            self.tell(figures())

    def tell(self, figures: dict[str, float]) -> None:
        """A line of the log and of metrics.jsonl, and a word to the operator of what is kept."""
        self._said = time.monotonic()
        line = {"step": self.step, **figures, "seconds": round(self.seconds + self._said - self._began, 3)}
        self.tally.evaluation = figures
        for name, value in figures.items():
            self.telemetry.metrics.figure(name, value)
        self.history.add({**line, "time": now()})
        self.checkpoints.put(METRICS, self.history.content())
        uri = self.checkpoints.uri(FOLDER)
        self.last_checkpoint = CheckpointInfo(step=self.step, uri=uri, time=now())
        self.telemetry.metrics.checkpoint_time.set(time.time())
        self.telemetry.update(evaluation=figures, checkpoints=[self.last_checkpoint])
        told = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in figures.items())
        self._print(f"{self.step} of {self.max_steps}: {told}")

    def all_there(self) -> None:
        """Wait until every process has made its share; then the ledger holds what all of them kept. Collective."""
        self.world.barrier("made")
        if self.world.size > 1 and self.world.first:
            self.step = int(self.world.store.add(self._counter, 0))
            self.ledger.load()

    def stopped(self, why: str) -> None:
        """From the waiting thread: nothing has to be saved, and what is on its way is waited for."""
        if self.work_in_hand is not None:
            self.work_in_hand.part()
            self.last_checkpoint = CheckpointInfo(step=self.step, uri=self.checkpoints.uri(FOLDER), time=now())
            why = f"Stopped on request after {self.step} of {self.max_steps} steps; every answer is kept."
        super().stopped(why)

    # The result

    def _export(self, made: Made) -> None:
        from finetune_trainer import export
        from finetune_trainer.making import page

        config = self.config
        self._phase("exporting", "writing the rows")
        folder = self.work / "output"
        folder.mkdir(parents=True, exist_ok=True)
        name = STAGES[config.stage].makes
        for file, rows in {name: made.rows, **made.beside}.items():
            (folder / file).write_text(lines(rows), encoding="utf-8")
        self.tell(made.figures)
        (folder / "metrics.jsonl").write_bytes(self.history.content())
        (folder / "README.md").write_text(page.card(config, name, len(made.rows)), encoding="utf-8")
        html = page.page(config, made, self._attempts(), versions(), self.seconds + time.monotonic() - self._began)
        (folder / "report.html").write_text(html, encoding="utf-8")
        facts = {
            "namespace": config.namespace,
            "name": config.name,
            "stage": config.stage,
            "rows": len(made.rows),
            "inputs": self.fetched.digests,
            "evaluation": made.figures,
        }
        self.fence.check()
        output = export.upload(folder, config.output_uri, "data", facts)
        self.outputs.append(output.model_copy(update={"uri": f"{output.uri.rstrip('/')}/{name}"}))

    def memory_settings(self) -> str:
        """The settings that decide over memory, in words."""
        return ""


def lines(rows: list[dict[str, Any]]) -> str:
    """Rows as JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def model_digest(config: TrainerConfig, digests: dict[str, str]) -> list[str]:
    """What tells the model of a run from others, its adapters included."""
    uris = [config.model.uri, *(adapter.uri for adapter in config.model.adapters)]
    wanted = [digest for uri, digest in sorted(digests.items()) if any(uri.split("@")[0] == one for one in uris)]
    return [*wanted, config.model.gguf_file]
