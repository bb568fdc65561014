"""Kahneman-Tversky optimisation (arXiv:2402.01306): single answers, each judged good or bad, and a frozen reference.

How far the model has moved from the reference is estimated by prompts with other prompts' answers, once per step over
the whole global batch (TRL: over a forward pass of all processes), so that a result does not depend on how the batch is
cut. An item is (prompt and its answer, prompt and another one's). Equal to TRL's KTOTrainer on one batch. Pure.
"""

from functools import partial
from typing import Any

import torch

from finetune_api.stages import Kto
from finetune_trainer.objectives import answers, sft
from finetune_trainer.objectives.head import Head


def weights(batch: dict[str, Any]) -> tuple[float, ...]:
    """Answers."""
    return (float(batch["items"]),)


def prepare(batch: dict[str, Any]) -> dict[str, Any]:
    """As sft's; ``own_places``, how many of the places are in the first sequences."""
    count = int((sft.targets(batch)[: batch["items"]] != sft.IGNORED).sum())
    return sft.prepare(batch) | {"own_places": count}


def _part(batch: dict[str, Any], number: int) -> dict[str, Any]:
    """The first (0) or the second (1) sequences of a prepared batch, as a prepared batch."""
    items, cut, width = batch["items"], batch["own_places"], batch["input_ids"].shape[-1]
    rows = slice(0, items) if number == 0 else slice(items, 2 * items)
    places = slice(0, cut) if number == 0 else slice(cut, None)
    return {
        key: batch[key][rows] for key in ("input_ids", "attention_mask", "position_ids", "tasks") if key in batch
    } | {"places": batch["places"][places] - number * items * width, "wanted": batch["wanted"][places]}


def before(model: Any, batch: dict[str, Any], head: Head | None) -> torch.Tensor:
    """float64 (2,): summed over the items, the log-ratio to the reference of the other prompts' answers; items."""
    moved = answers.log_probs(model, _part(batch, 1), head) - batch["reference"][:, 1]
    return torch.stack([moved.double().sum(), moved.new_tensor(float(len(moved)), dtype=torch.float64)])


def loss_sums(
    options: Kto, model: Any, batch: dict[str, Any], head: Head | None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss summed over answers. ``batch["before"]`` is what :func:`before` gives over the whole global batch."""
    ratios = answers.log_probs(model, _part(batch, 0), head) - batch["reference"][:, 0]
    good = batch["desirable"].bool()
    sign = torch.where(good, 1.0, -1.0)
    moved = torch.zeros((), device=ratios.device)
    if options.loss_type == "kto":
        total, count = batch["before"].unbind()
        moved = (total / count.clamp(min=1)).clamp(min=0).float()
    weight = torch.where(good, options.desirable_weight, options.undesirable_weight)
    losses = weight * (1 - torch.sigmoid(options.beta * sign * (ratios - moved)))
    rewards = options.beta * ratios.detach().double()
    return losses.sum().reshape(1), {
        "good": good.double().sum(),
        "bad": (~good).double().sum(),
        "rewards_good": (rewards * good).sum(),
        "rewards_bad": (rewards * ~good).sum(),
        "kl": moved.double() * len(good),
    }


def figures(told: dict[str, torch.Tensor]) -> dict[str, float]:
    """``reward_chosen`` and ``reward_rejected`` (of good and bad answers), ``margin`` between them, ``kl``, how far the
    model has moved from the reference in nats."""
    count = {kind: float(told[kind]) for kind in ("good", "bad")}
    mean = {kind: float(told[f"rewards_{kind}"]) / max(count[kind], 1.0) for kind in ("good", "bad")}
    found = {"kl": float(told["kl"]) / max(sum(count.values()), 1.0)}
    if count["good"]:
        found["reward_chosen"] = mean["good"]
    if count["bad"]:
        found["reward_rejected"] = mean["bad"]
    if count["good"] and count["bad"]:
        found["margin"] = mean["good"] - mean["bad"]
    return found


def functions(options: Kto) -> dict[str, Any]:
    """What an ``Objective`` is made of."""
    return {
        "weights": weights,
        "prepare": prepare,
        "loss_sums": partial(loss_sums, options),
        "reference": answers.reference,
        "before": before if options.loss_type == "kto" else None,
        "figures": figures,
    }
