"""What a run notes about its steps: metrics, the lines of metrics.jsonl, and the sums that outlive an attempt.

Filled by ``run.py``; every number is one that all processes agreed on. The :class:`Tally` goes into each checkpoint
(``run.json``), so that a line over several steps, or the tokens of the whole run, come out the same after a restart.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from finetune_trainer.best import Best
from finetune_trainer.flops import ModelCost
from finetune_trainer.telemetry import Telemetry, host_memory, now


@dataclass(frozen=True)
class Step:
    """One optimizer step, over all processes."""

    number: int
    epoch: float
    loss_sums: list[float]
    """The terms of the loss."""
    weights: list[float]
    """Label tokens, pairs …: what each term is a mean over."""
    sums: list[float]
    """What the objective tells, as ``Engine.figures`` reads it."""
    tokens: int
    """Useful ones, padding excluded."""
    pairs: int
    """Pairs of tokens that attention looks at."""
    learning_rate: float
    grad_norm: float
    seconds: float
    waited: float
    """Seconds that rank 0 waited for its data."""

    @property
    def loss(self) -> float:
        """The sum of its terms, each a mean."""
        return mean_loss(self.loss_sums, self.weights)


@dataclass
class Window:
    """What has gathered since the last line of metrics.jsonl."""

    loss_sums: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    sums: list[float] = field(default_factory=list)
    tokens: int = 0
    pairs: int = 0
    steps: int = 0
    seconds: float = 0.0
    waited: float = 0.0

    def add(self, step: Step) -> None:
        """One step more."""
        for name in ("loss_sums", "weights", "sums"):
            mine, more = getattr(self, name), getattr(step, name)
            setattr(self, name, [a + b for a, b in zip(mine or [0.0] * len(more), more, strict=True)])
        self.tokens += step.tokens
        self.pairs += step.pairs
        self.steps += 1
        self.seconds += step.seconds
        self.waited += step.waited


def mean_loss(sums: list[float], weights: list[float]) -> float:
    """The sum of a loss's terms, each a mean over its weight."""
    return sum(total / max(weight, 1) for total, weight in zip(sums, weights, strict=True))


@dataclass
class Tally:
    """What a run remembers from attempt to attempt."""

    window: Window = field(default_factory=Window)
    seconds: float = 0.0
    """In training steps."""
    tokens: int = 0
    before: dict[str, str] = field(default_factory=dict)
    """Answers before training, by prompt."""
    evaluation: dict[str, float] = field(default_factory=dict)
    evaluated_step: int = -1
    kl_coef: float | None = None
    """PPO's, of the next step."""
    best: Best = field(default_factory=Best)
    confusion: list[list[int]] = field(default_factory=list)
    """Of a classifier's last evaluation."""

    def document(self) -> bytes:
        """As JSON."""
        return json.dumps({**self.__dict__, "window": self.window.__dict__, "best": self.best.__dict__}).encode()

    @classmethod
    def of(cls, document: dict[str, Any]) -> "Tally":
        """Read back; of an empty document the beginning."""
        if not document:
            return cls()
        return cls(**{**document, "window": Window(**document["window"]), "best": Best(**document["best"])})


class Logbook:
    """Notes steps in telemetry and tally, and makes the lines of metrics.jsonl."""

    def __init__(
        self,
        telemetry: Telemetry,
        tally: Tally,
        *,
        max_steps: int,
        cost: ModelCost,
        peak: float | None,
        device: Any,
        figures: Callable[[list[float]], dict[str, float]] = lambda sums: {},
    ) -> None:
        """``peak``: FLOP/s of all GPUs together, None where it is not known. ``figures``: what the objective tells, of
        its summed sums."""
        self.telemetry = telemetry
        self.tally = tally
        self.max_steps = max_steps
        self.cost = cost
        self.peak = peak
        self.device = device
        self.figures = figures
        self._pace: float | None = None

    def note(self, step: Step) -> None:
        """A step was made."""
        self.tally.window.add(step)
        self.tally.seconds += step.seconds
        self.tally.tokens += step.tokens
        metrics = self.telemetry.metrics
        metrics.loss.set(step.loss)
        metrics.learning_rate.set(step.learning_rate)
        metrics.grad_norm.set(step.grad_norm)
        metrics.step.set(step.number)
        metrics.epoch.set(step.epoch)
        metrics.tokens.inc(step.tokens)
        metrics.step_seconds.observe(step.seconds)
        metrics.data_wait.inc(step.waited)
        self._pace = step.seconds if self._pace is None else 0.9 * self._pace + 0.1 * step.seconds
        self.telemetry.update(
            step=step.number,
            epoch=round(step.epoch, 4),
            loss=step.loss,
            learning_rate=step.learning_rate,
            grad_norm=step.grad_norm,
            step_seconds=self._pace,
            eta_seconds=round(self._pace * (self.max_steps - step.number), 1),
            last_step_time=now(),
            message=f"step {step.number} of {self.max_steps}",
        )

    def line(self, step: Step) -> dict[str, Any]:
        """A line for metrics.jsonl over the steps since the last one; loss and times are means over them."""
        window = self.tally.window
        self.tally.window = Window()
        seconds = max(window.seconds, 1e-9)
        pace = window.tokens / seconds
        mfu = self.cost.of(window.tokens, window.pairs) / seconds / self.peak if self.peak else None
        memory = self._memory()
        for kind, size in memory.items():
            self.telemetry.metrics.memory(kind, size)
        if mfu is not None:
            self.telemetry.metrics.mfu.set(mfu)
        self.telemetry.metrics.tokens_per_second.set(pace)
        self.telemetry.update(tokens_per_second=round(pace, 2), mfu=mfu)
        return {
            "step": step.number,
            "epoch": round(step.epoch, 6),
            "loss": mean_loss(window.loss_sums, window.weights),
            **self._objective(window),
            "learning_rate": step.learning_rate,
            "grad_norm": step.grad_norm,
            "tokens": self.tally.tokens,
            "tokens_per_second": round(pace, 3),
            "step_seconds": round(seconds / max(window.steps, 1), 6),
            "data_wait_seconds": round(window.waited / max(window.steps, 1), 6),
            "memory": memory,
            "mfu": mfu,
            "time": now(),
        }

    def _objective(self, window: Window) -> dict[str, float]:
        figures = self.figures(window.sums)
        for name, value in figures.items():
            self.telemetry.metrics.figure(name, value)
        return figures

    def evaluated(self, step: int, figures: dict[str, float]) -> dict[str, float]:
        """Evaluation figures of a step; as they stand in metrics.jsonl."""
        self.tally.evaluation, self.tally.evaluated_step = figures, step
        self.telemetry.metrics.evaluation(figures)
        self.telemetry.update(evaluation=figures)
        return {f"eval_{name}": value for name, value in figures.items()}

    def method(self, figures: dict[str, float]) -> dict[str, float]:
        """What the method tells about itself; as it stands in metrics.jsonl."""
        for name, value in figures.items():
            self.telemetry.metrics.method(name, value)
        return figures

    def _memory(self) -> dict[str, int]:
        sizes = {"rss": host_memory()}
        if self.device.type == "cuda":
            import torch

            sizes |= {
                "allocated": torch.cuda.memory_allocated(),
                "peak": torch.cuda.max_memory_allocated(),
                "reserved": torch.cuda.memory_reserved(),
            }
        return sizes


def for_people(line: dict[str, Any], max_steps: int) -> str:
    """A line of metrics.jsonl as one line of the log."""
    text = f"step {line['step']}/{max_steps} epoch {line['epoch']:.2f}"
    if "loss" in line:  # not before the first step
        text += (
            f" loss {line['loss']:.4f} lr {line['learning_rate']:.3e} grad_norm {line['grad_norm']:.3f} "
            f"{line['tokens_per_second']:,.0f} tok/s {line['step_seconds']:.3f} s/step"
        )
    if line.get("mfu") is not None:
        text += f" mfu {line['mfu']:.1%}"
    for name in ("eval_loss", "eval_accuracy", "eval_f1", "eval_spearman", "eval_rougeL"):
        if name in line:
            text += f" {name} {line[name]:.4f}"
    return text
