"""Which evaluation was the best one, and whether it is time to stop: ``training.load_best_model_at_end``,
``metric_for_best_model``, ``greater_is_better``, ``early_stopping_patience``, ``early_stopping_threshold``.

Pure; named and meant as in transformers. Called by ``run.py``, on rank 0, which alone remembers earlier attempts.
"""

import math
from dataclasses import dataclass, field

from finetune_api.causes import Cause
from finetune_api.spec import Training
from finetune_trainer.outcome import RunError


@dataclass
class Best:
    """The best evaluation so far. Kept with every checkpoint."""

    step: int = 0
    """0: there was none."""
    value: float = 0.0
    evaluation: dict[str, float] = field(default_factory=dict)
    waited: int = 0
    """Evaluations since then."""


def watched(training: Training) -> bool:
    """Evaluations are compared at all."""
    return training.load_best_model_at_end or training.early_stopping_patience > 0


def judge(best: Best, training: Training, step: int, figures: dict[str, float]) -> Best:
    """The best evaluation after another one. RunError(INVALID_CONFIGURATION) where it does not tell the metric."""
    name = training.metric_for_best_model.removeprefix("eval_")
    if name not in figures:
        raise RunError(
            Cause.INVALID_CONFIGURATION,
            f"training.metric_for_best_model is {training.metric_for_best_model!r}, which the evaluation does not tell."
            f" Accepted: {', '.join(sorted(figures))}.",
        )
    value = figures[name]
    if not best.step or _better(value, best.value, training, name):
        return Best(step, value, dict(figures), 0)
    return Best(best.step, best.value, best.evaluation, best.waited + 1)


def exhausted(best: Best, training: Training) -> bool:
    """The patience is at its end."""
    return 0 < training.early_stopping_patience <= best.waited


def _better(value: float, than: float, training: Training, name: str) -> bool:
    greater = training.greater_is_better
    if greater is None:  # as transformers has it, which knows no perplexity
        greater = name.partition("/")[0] not in ("loss", "perplexity", "nll_loss", "kl", "mse", "mae", "rmse")
    if not math.isfinite(value):
        return False
    gain = value - than if greater else than - value
    return gain > training.early_stopping_threshold
