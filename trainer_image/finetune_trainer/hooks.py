"""What a method adds to the training step, beyond the weights it trains. Most add nothing.

Made by the optional function ``hooks(model, method, max_steps)`` of a module in ``methods/``; called by ``engine.py``
(the step), ``state.py`` (checkpoints) and ``run.py`` (metrics).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Hooks:
    """What a method adds."""

    learning_rate_ratio: Callable[[str], float] | None = None
    """By the name of a parameter: its learning rate, as a multiple of the step's."""
    extra_loss: Callable[[], torch.Tensor] | None = None
    """A term of the loss (a scalar), asked for after every forward pass; once per step it counts as a whole."""
    after_update: Callable[[int], None] | None = None
    """Called with the number of the step (from 1) when the optimizer has changed the weights and their (summed and
    clipped) gradients are still there. Only without ZeRO, where a process has both whole."""
    statistics: Callable[[], dict[str, dict[str, torch.Tensor]]] | None = None
    """By the name of a trained parameter: what the method remembers about it, live tensors of its shape by kind. They
    go into every checkpoint and are written in place when a run continues."""
    figures: Callable[[], dict[str, float]] | None = None
    """Numbers for metrics.jsonl and Prometheus, by name."""


NOTHING = Hooks()
