"""What a stage minimises: one file per stage, chosen by ``spec.stage``.

An objective is a set of pure functions over a collated batch. The loss is a sum of terms, each a mean over something
(label tokens, pairs): ``weights`` counts over how many, ``loss_sums`` gives the sums. The engine divides each by its
weight in the whole global batch, so that a result does not depend on how the batch is cut into processes and forward
passes. What is told beside the loss (accuracy, margins) is made of sums, too, for the same reason.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from finetune_api.run import TrainerConfig
from finetune_trainer.data.stream import collate
from finetune_trainer.objectives import sft
from finetune_trainer.objectives.head import Head

Sums = dict[str, Any]
"""Tensors by name, each of a fixed shape, that add up over batches."""


def _as_it_is(batch: dict[str, Any]) -> dict[str, Any]:
    return batch


def _nothing(sums: Sums) -> dict[str, float]:
    return {}


@dataclass(frozen=True)
class Objective:
    """How one stage learns."""

    weights: Callable[[dict[str, Any]], tuple[float, ...]]
    """Of a collated batch: over how many (label tokens, pairs …) each of the K terms of its loss is a mean."""
    loss_sums: Callable[[Any, dict[str, Any], Head | None], tuple[Any, Sums]]
    """(model, prepared batch, output layer) to the K summed terms, fp32 (K,) with a graph, and to the sums for
    ``figures``, without one."""
    figures: Callable[[Sums], dict[str, float]] = _nothing
    """Figures by name, of the sums of a whole step or evaluation. Their names have no slash."""
    prepare: Callable[[dict[str, Any]], dict[str, Any]] = _as_it_is
    """A collated batch with what ``loss_sums`` needs beside it and is better found on the host."""
    collate: Callable[..., dict[str, Any]] = collate
    """(items, pad_token_id) to a batch of tensors."""
    terms: int = 1
    """K"""
    per_token: bool = False
    """The loss is one of nats per token: exp(loss) is told as the perplexity."""


OBJECTIVES: dict[str, Callable[[TrainerConfig], Objective]] = {
    "sft": lambda config: Objective(weights=sft.weights, loss_sums=sft.loss_sums, prepare=sft.prepare, per_token=True),
}
"""By stage."""


def objective(config: TrainerConfig) -> Objective:
    """What the run minimises."""
    return OBJECTIVES[config.stage](config)
