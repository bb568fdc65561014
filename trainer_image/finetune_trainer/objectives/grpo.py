"""Group-relative policy optimisation (arXiv:2402.03300) and its relatives: several answers to each prompt, each judged
by how much better it is than the others.

Equal to TRL's GRPOTrainer, ``loss_type`` by ``loss_type``, where a batch is a global one: what TRL averages over a
forward pass (bnpo) or over processes is here averaged over all answers of an update. Pure.
"""

from functools import partial
from typing import Any

import numpy as np
import torch

from finetune_api.reinforcement import Grpo
from finetune_trainer.objectives import policy
from finetune_trainer.objectives.head import Head


def advantages(options: Grpo, rewards: np.ndarray) -> np.ndarray:
    """fp32 (answers,): of ``rewards`` (answers,), the num_generations answers to a prompt in succession."""
    groups = rewards.astype(np.float64).reshape(-1, options.num_generations)
    found = groups - groups.mean(1, keepdims=True)
    if options.scale_rewards == "group":
        found = found / (groups.std(1, ddof=1, keepdims=True) + 1e-4)
    elif options.scale_rewards == "batch":
        found = found / (groups.std(ddof=1) + 1e-4)
    return found.reshape(-1).astype(np.float32)


def weights(options: Grpo, batch: dict[str, Any]) -> tuple[float, ...]:
    """Answers, or their tokens, or as many as there could be, by loss_type."""
    answers = float(len(batch["lengths"]))
    match options.loss_type:
        case "grpo" | "sapo" | "luspo":
            return (answers,)
        case "dr_grpo":
            return (answers * options.max_completion_length,)
        case _:
            return (float(batch["learned"].sum()),)


def loss_sums(
    options: Grpo, model: Any, batch: dict[str, Any], head: Head | None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss, summed as ``weights`` counts.

    Beside ``policy.py``'s, a batch has ``advantages`` (N,), ``learned`` (N,), 1.0 or 0.0, and where beta is not 0
    ``reference_log_probs`` (N,). Without ``old`` the answers are the policy's own.
    """
    log_probs, entropy = policy.said(model, batch, head, options.temperature, values=False).unbind(-1)
    mask, advantage = batch["learned"], batch["advantages"]
    counts = policy.by_answer(mask, batch).clamp(min=1.0)
    log_ratio = log_probs - batch.get("old", log_probs.detach())
    if options.importance_sampling_level == "sequence":
        mean = policy.by_answer(log_ratio * mask, batch) / counts
        log_ratio = torch.cat([one.expand(n) for one, n in zip(mean, batch["lengths"], strict=True)])
    ratio = torch.exp(log_ratio)
    losses = _losses(options, ratio, log_probs, advantage)
    low, high = 1 - options.epsilon, 1 + _high(options)
    told = {
        "tokens": mask.double().sum(),
        "clipped": (((ratio < low) & (advantage < 0) | (ratio > high) & (advantage > 0)) * mask).double().sum(),
        "entropy": (entropy * mask).double().sum(),
    }
    if options.beta:
        away = batch["reference_log_probs"] - log_probs
        divergence = torch.exp(away) - away - 1
        told["divergence"] = (divergence * mask).detach().double().sum()
        losses = losses + options.beta * divergence * (ratio if options.use_bias_correction_kl else 1.0)
    losses = losses * mask
    if options.loss_type in ("grpo", "sapo"):
        return (policy.by_answer(losses, batch) / counts).sum().reshape(1), told
    return losses.sum().reshape(1), told


def _high(options: Grpo) -> float:
    return options.epsilon if options.epsilon_high is None else options.epsilon_high


def _losses(options: Grpo, ratio: torch.Tensor, log_probs: torch.Tensor, advantage: torch.Tensor) -> torch.Tensor:
    """(N,): the loss of every token by its ratio of probabilities, now to then."""
    if options.loss_type == "cispo":
        return -ratio.clamp(max=_high(options)).detach() * advantage * log_probs
    if options.loss_type == "sapo":
        heat = torch.where(advantage > 0, options.sapo_temperature_pos, options.sapo_temperature_neg)
        return -torch.sigmoid(heat * (ratio - 1)) * 4 / heat * advantage
    clipped = ratio.clamp(1 - options.epsilon, 1 + _high(options))
    if options.delta is not None:
        ratio = ratio.clamp(max=options.delta)
    return -torch.minimum(ratio * advantage, clipped * advantage)


def figures(told: dict[str, torch.Tensor]) -> dict[str, float]:
    """``clip_fraction`` of the tokens and ``entropy`` (nats) per token; with beta ``divergence``, nats per token away
    from the reference (k3); means over the updates."""
    tokens = max(float(told["tokens"]), 1.0)
    names = {"clip_fraction": "clipped", "entropy": "entropy", "divergence": "divergence"}
    return {name: float(told[key]) / tokens for name, key in names.items() if key in told}


def functions(options: Grpo) -> dict[str, Any]:
    """What an ``Objective`` is made of."""
    return {
        "weights": partial(weights, options),
        "loss_sums": partial(loss_sums, options),
        "figures": figures,
    }
