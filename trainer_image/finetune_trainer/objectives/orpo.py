"""Odds-ratio preference optimisation (arXiv:2403.07691): SFT on the better answer and an odds ratio, no reference.

As in TRL's ORPOTrainer the SFT part covers the whole text, prompt included, and the odds are those of the mean
log-probability of an answer's tokens. Pure.
"""

from functools import partial
from typing import Any

import torch
from torch.nn.functional import logsigmoid

from finetune_api.stages import Orpo
from finetune_trainer.objectives import answers, sft
from finetune_trainer.objectives.head import Head


def weights(batch: dict[str, Any]) -> tuple[float, ...]:
    """Tokens of the better texts, and pairs."""
    pairs = batch["items"]
    return (float(batch["attention_mask"][:pairs, 1:].sum()), float(pairs))


def prepare(batch: dict[str, Any]) -> dict[str, Any]:
    """The places of all tokens of the better texts and of the worse answers; ``answer`` (N,), 1.0 in answers."""
    pairs = batch["items"]
    whole = batch["labels"].clone()
    whole[:pairs] = batch["input_ids"][:pairs].masked_fill(batch["attention_mask"][:pairs] == 0, sft.IGNORED)
    wanted = sft.targets(batch | {"labels": whole})
    answer = (sft.targets(batch) != sft.IGNORED)[wanted != sft.IGNORED]
    return sft.prepare(batch | {"labels": whole}) | {
        "lengths": answers.lengths(batch),
        "answer": answer.float() if len(answer) else torch.zeros(1),
    }


def loss_sums(
    options: Orpo, model: Any, batch: dict[str, Any], head: Head | None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Cross-entropy over the tokens of the better texts, and the odds ratio over pairs."""
    pairs = batch["items"]
    losses = sft.token_losses(model, batch, head)
    words = answers.sums(losses, batch)[:pairs].sum()
    means = answers.sums(-losses * batch["answer"], batch) / batch["lengths"].clamp(min=1)
    better, worse = means.split(pairs)
    log_odds = (better - worse) - (_log1mexp(better) - _log1mexp(worse))
    told = answers.compared(options.beta * better, options.beta * worse)
    told |= {"log_odds": log_odds.detach().double().sum(), "nats": words.detach().double()}
    told["tokens"] = batch["attention_mask"][:pairs, 1:].sum().double()
    return torch.stack([words, -options.beta * logsigmoid(log_odds).sum()]), told


def figures(told: dict[str, torch.Tensor]) -> dict[str, float]:
    """As :func:`answers.figures`; ``log_odds`` of the better over the worse answers; ``nll_loss``, nats per token of
    the better texts."""
    return answers.figures(told) | {
        "log_odds": float(told["log_odds"]) / max(float(told["pairs"]), 1.0),
        "nll_loss": float(told["nats"]) / max(float(told["tokens"]), 1.0),
    }


def _log1mexp(value: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(value)) without cancellation, value <= 0.

    Of an answer that is certain, 0, it would be minus infinity, and the loss no number: the value next to 0 is taken.
    """
    value = value.clamp(max=-torch.finfo(value.dtype).eps)
    return torch.where(value < -0.6931471805599453, torch.log1p(-torch.exp(value)), torch.log(-torch.expm1(value)))


def functions(options: Orpo) -> dict[str, Any]:
    """What an ``Objective`` is made of."""
    return {
        "weights": weights,
        "prepare": prepare,
        "loss_sums": partial(loss_sums, options),
        "figures": figures,
        "terms": 2,
    }
