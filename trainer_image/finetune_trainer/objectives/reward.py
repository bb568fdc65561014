"""A reward model: a scalar head, and the probability that the better of two answers wins (Bradley-Terry).

The score is what transformers' sequence classifiers give, at the last token, so that plain transformers and peft score
as the training did. Equal to TRL's RewardTrainer. Pure.
"""

from functools import partial
from typing import Any

import torch
from torch.nn.functional import logsigmoid

from finetune_api.stages import Reward
from finetune_trainer.objectives import answers
from finetune_trainer.objectives.head import Head


def weights(batch: dict[str, Any]) -> tuple[float, ...]:
    """Pairs."""
    return (float(batch["items"]),)


def loss_sums(
    options: Reward, model: Any, batch: dict[str, Any], head: Head | None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss summed over pairs."""
    del head
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "tasks") if key in batch}
    scores = model(**inputs, use_cache=False).logits.float().squeeze(-1)
    better, worse = scores.split(batch["items"])
    margin = batch["margin"] if options.use_margin else 0.0
    losses = -logsigmoid(better - worse - margin)
    if options.center_rewards_coefficient:
        losses = losses + options.center_rewards_coefficient * (better + worse) ** 2
    return losses.sum().reshape(1), answers.compared(better, worse)


def functions(options: Reward) -> dict[str, Any]:
    """What an ``Objective`` is made of."""
    return {"weights": weights, "loss_sums": partial(loss_sums, options), "figures": answers.figures}
