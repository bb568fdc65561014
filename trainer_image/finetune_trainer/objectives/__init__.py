"""What a stage minimises: one file per stage, chosen by ``spec.stage``.

An objective is a set of pure functions over a collated batch. The loss is a sum of terms, each a mean over something
(label tokens, pairs): ``weights`` counts over how many, ``loss_sums`` gives the sums. The engine divides each by its
weight in the whole global batch, so that a result does not depend on how the batch is cut into processes and forward
passes. What is told beside the loss (accuracy, margins) is made of sums, too, for the same reason.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from finetune_api.reinforcement import Grpo, Ppo
from finetune_api.run import TrainerConfig
from finetune_api.stages import Dpo, Kto, Orpo, Reward
from finetune_trainer.data.labels import Labels
from finetune_trainer.data.stream import collate
from finetune_trainer.objectives import classification, dpo, grpo, kto, orpo, ppo, reward, seq2seq, sft
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
    reference: Callable[[Any, dict[str, Any], Head | None], Any] | None = None
    """What ``loss_sums`` needs of the model as it was before training, fp32 (B, P) of a prepared batch of B items; it
    comes as ``batch["reference"]``."""
    before: Callable[[Any, dict[str, Any], Head | None], Any] | None = None
    """What ``loss_sums`` needs to know of the whole global batch: sums, float64 (n,), of a prepared batch, made without
    gradients before the first backward pass; ``batch["before"]`` is their sum over all batches and processes."""
    precompute: bool = False
    """``reference`` is asked once for every row, before training."""
    of_rows: Callable[[np.ndarray], dict[str, float]] | None = None
    """Figures of an evaluation that need all rows at once (rank correlations): of what ``loss_sums`` gives as ``rows``,
    (B, c) of a batch, which is not added up."""
    labels: tuple[str, ...] = ()
    """Of an evaluation's sum ``confusion`` (K, K): how often label i was taken for j."""
    terms: int = 1
    """K"""
    per_token: bool = False
    """The loss is one of nats per token: exp(loss) is told as the perplexity."""


def _language_model(config: TrainerConfig) -> Objective:
    told = Objective(weights=sft.weights, loss_sums=sft.loss_sums, prepare=sft.prepare, per_token=True)
    positions = config.evaluation.perplexity_positions
    return replace(told, **sft.by_position([*positions, config.data.max_length])) if positions else told


def _dpo(config: TrainerConfig) -> Objective:
    options = config.dpo or Dpo()
    return Objective(**dpo.functions(options), precompute=options.precompute_ref_log_probs)


def _kto(config: TrainerConfig) -> Objective:
    options = config.kto or Kto()
    return Objective(**kto.functions(options), precompute=options.precompute_ref_log_probs)


OBJECTIVES: dict[str, Callable[[TrainerConfig], Objective]] = {
    "pretrain": _language_model,
    "sft": _language_model,
    "reward": lambda config: Objective(**reward.functions(config.reward or Reward())),
    "dpo": _dpo,
    "kto": _kto,
    "orpo": lambda config: Objective(**orpo.functions(config.orpo or Orpo())),
    "ppo": lambda config: Objective(**ppo.functions(config.ppo or Ppo())),
    "grpo": lambda config: Objective(**grpo.functions(config.grpo or Grpo())),
}
"""By stage."""


def objective(config: TrainerConfig, tokenizer: Any = None, labels: Labels | None = None) -> Objective:
    """What the run minimises. ``labels``: of stages that have some; those and seq2seq ask the tokenizer."""
    if labels is not None:
        return Objective(**classification.functions(config.stage, labels, tokenizer))
    if config.stage == "seq2seq":
        return Objective(**seq2seq.functions(config, tokenizer), per_token=True)
    return OBJECTIVES[config.stage](config)
