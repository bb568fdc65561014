"""What a stage minimises: one file per stage, chosen by ``spec.stage``.

An objective is three pure functions. ``prepare`` adds to a collated batch what is better found on the host;
``weight`` counts what the loss of a batch is a mean over (for language models the label tokens); ``loss_sum`` is the
loss summed, not averaged, over them. The engine divides by the weight of the
whole global batch, so that a result does not depend on how the batch is cut into processes and forward passes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from finetune_trainer.objectives import sft
from finetune_trainer.objectives.head import Head


@dataclass(frozen=True)
class Objective:
    """How one stage learns."""

    prepare: Callable[[dict[str, Any]], dict[str, Any]]
    """A collated batch with what ``loss_sum`` needs beside it."""
    weight: Callable[[dict[str, Any]], int]
    """Terms of a collated batch's loss."""
    loss_sum: Callable[[Any, dict[str, Any], Head | None], Any]
    """(model, prepared batch, output layer) to the summed loss, an fp32 scalar with a graph."""


OBJECTIVES: dict[str, Objective] = {"sft": Objective(sft.prepare, sft.weight, sft.loss_sum)}
