"""Direct preference optimisation and its relatives, of pairs of answers and a frozen reference.

Equal to TRL's DPOTrainer, ``loss_type`` by ``loss_type`` (its aot losses are not here: they sort over a batch, so that
their result depends on how it is cut). ``rpo_alpha`` is TRL's further loss ``sft``. Pure.
"""

import math
from functools import partial
from typing import Any

import torch
from torch.nn.functional import logsigmoid

from finetune_api.stages import Dpo
from finetune_trainer.objectives import answers, sft
from finetune_trainer.objectives.head import Head


def weights(options: Dpo, batch: dict[str, Any]) -> tuple[float, ...]:
    """Pairs, and with rpo_alpha the label tokens of the better answers."""
    pairs = batch["items"]
    tokens = float(answers.lengths(batch)[:pairs].sum()) if options.rpo_alpha else 0.0
    return (float(pairs), tokens) if options.rpo_alpha else (float(pairs),)


def prepare(options: Dpo, batch: dict[str, Any]) -> dict[str, Any]:
    """With ``share`` (N,), how much each label token counts (``ld_alpha``)."""
    batch = answers.prepare(batch)
    if options.ld_alpha is None:
        return batch
    pairs = batch["items"]
    shorter = torch.minimum(*batch["lengths"].split(pairs)).repeat(2)
    labelled = sft.targets(batch) != sft.IGNORED
    shared = labelled.cumsum(-1) <= shorter.unsqueeze(-1)
    share = torch.where(shared, 1.0, options.ld_alpha)[labelled]
    return batch | {"share": share if len(share) else torch.zeros(1)}


def reference(options: Dpo, model: Any, batch: dict[str, Any], head: Head | None) -> torch.Tensor:
    """fp32 (B, 2): the log-probabilities of both answers."""
    return answers.by_item(_weighed(sft.token_losses(model, batch, head), batch), batch)


def loss_sums(
    options: Dpo, model: Any, batch: dict[str, Any], head: Head | None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss summed over pairs, and with rpo_alpha over the tokens of the better answers; figures of both."""
    pairs = batch["items"]
    losses = sft.token_losses(model, batch, head)
    said = answers.by_item(_weighed(losses, batch), batch)
    better, worse = (said - batch["reference"]).unbind(-1)
    terms = [_losses(options, better, worse, batch["lengths"].split(pairs)).sum()]
    if options.rpo_alpha:
        terms.append(options.rpo_alpha * answers.sums(losses, batch)[:pairs].sum())
    told = answers.compared(options.beta * better, options.beta * worse)
    told["logps_chosen"], told["logps_rejected"] = said.detach().double().sum(0).unbind()
    return torch.stack(terms), told


def figures(told: dict[str, torch.Tensor]) -> dict[str, float]:
    """As :func:`answers.figures`; ``logps_chosen`` and ``logps_rejected``, in nats."""
    pairs = max(float(told["pairs"]), 1.0)
    return answers.figures(told) | {name: float(told[name]) / pairs for name in ("logps_chosen", "logps_rejected")}


def _weighed(losses: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
    share = batch.get("share")
    return answers.sums(-losses if share is None else -losses * share, batch)


def _losses(options: Dpo, better: torch.Tensor, worse: torch.Tensor, lengths: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """(B,): the loss of each pair by the log-ratios to the reference of its two answers."""
    beta, epsilon = options.beta, options.label_smoothing
    delta = beta * (better - worse)
    match options.loss_type:
        case "sigmoid":
            return -logsigmoid(delta) * (1 - epsilon) - logsigmoid(-delta) * epsilon
        case "hinge":
            return torch.relu(1 - delta)
        case "ipo" | "sigmoid_norm":
            mean = better / lengths[0].clamp(min=1) - worse / lengths[1].clamp(min=1)
            return (mean - 1 / (2 * beta)) ** 2 if options.loss_type == "ipo" else -logsigmoid(beta * mean)
        case "exo_pair":
            return torch.sigmoid(delta) * (logsigmoid(delta) - math.log1p(-epsilon)) + torch.sigmoid(-delta) * (
                logsigmoid(-delta) - math.log(epsilon)
            )
        case "nca_pair":
            return -logsigmoid(beta * better) - 0.5 * logsigmoid(-beta * better) - 0.5 * logsigmoid(-beta * worse)
        case "robust":
            clean, flipped = -(1 - epsilon) * logsigmoid(delta), -epsilon * logsigmoid(-delta)
            return (clean - flipped) / (1 - 2 * epsilon)
        case "bco_pair":
            return -logsigmoid(beta * better) - logsigmoid(-beta * worse)
        case "sppo_hard":
            return (better - 0.5 / beta) ** 2 + (worse + 0.5 / beta) ** 2
        case "apo_zero":
            return 1 - torch.sigmoid(beta * better) + torch.sigmoid(beta * worse)
        case "apo_down":
            return torch.sigmoid(beta * better) + 1 - torch.sigmoid(delta)
        case "discopop":
            share = torch.sigmoid(delta / options.discopop_tau)
            return -logsigmoid(delta) * (1 - share) + torch.exp(-delta) * share


def functions(options: Dpo) -> dict[str, Any]:
    """What an ``Objective`` is made of."""
    return {
        "weights": partial(weights, options),
        "prepare": partial(prepare, options),
        "loss_sums": partial(loss_sums, options),
        "reference": partial(reference, options),
        "figures": figures,
        "terms": 2 if options.rpo_alpha else 1,
    }
