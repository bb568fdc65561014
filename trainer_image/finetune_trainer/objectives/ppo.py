"""Proximal policy optimisation (arXiv:1707.06347) of a language model, as InstructGPT and TRL's PPOTrainer do it.

The first half makes of judged answers what is to be learned, in numpy: rewards per token, advantages (GAE,
arXiv:1506.02438) and returns over a whole global batch, so that they do not depend on how it is cut. The second half is
the loss over a batch of answers (``policy.py``). Pure.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from finetune_api.reinforcement import Ppo
from finetune_trainer.objectives import policy
from finetune_trainer.objectives.head import Head

# --- what is to be learned ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lessons:
    """Of the answers of a global batch, A tokens each."""

    advantages: list[np.ndarray]
    """fp32 (A,), whitened over all tokens."""
    returns: list[np.ndarray]
    """fp32 (A,): what the values should have been."""
    kl: np.ndarray
    """float64 (answers,): nats away from the reference, summed over the tokens of an answer."""


def lessons(
    options: Ppo,
    kl_coef: float,
    scores: np.ndarray,
    ended: np.ndarray,
    log_probs: list[np.ndarray],
    references: list[np.ndarray] | None,
    values: list[np.ndarray],
) -> Lessons:
    """What is to be learned of answers with these ``scores`` (answers,), that ``ended`` by themselves or not, and of
    their tokens' log-probabilities, the reference's, and the values before them, (A,) each."""
    scores = scores.astype(np.float64)
    if options.missing_eos_penalty:
        scores = scores - options.missing_eos_penalty * ~ended
    away = [_divergence(options, old, ref) for old, ref in zip(log_probs, references or log_probs, strict=True)]
    rewards = [-kl_coef * kl for kl in away]
    for reward, score in zip(rewards, scores, strict=True):
        reward[-1] += score
    if options.whiten_rewards:
        deviation = np.sqrt(_variance(np.concatenate(rewards)) + 1e-8)
        rewards = [reward / deviation for reward in rewards]
    advantages = [gae(reward, value, options.gamma, options.lam) for reward, value in zip(rewards, values, strict=True)]
    returns = [(advantage + value).astype(np.float32) for advantage, value in zip(advantages, values, strict=True)]
    every = np.concatenate(advantages)
    mean, deviation = every.mean(), np.sqrt(_variance(every) + 1e-8)
    whitened = [((advantage - mean) / deviation).astype(np.float32) for advantage in advantages]
    return Lessons(whitened, returns, np.array([kl.sum() for kl in away]))


def gae(rewards: np.ndarray, values: np.ndarray, gamma: float, lam: float) -> np.ndarray:
    """float64 (A,): generalised advantage estimation over one answer, after which nothing comes.

    delta_t = r_t + gamma V_(t+1) - V_t; A_t = delta_t + gamma lam A_(t+1).
    """
    advantages = np.zeros(len(rewards), np.float64)
    following, value_after = 0.0, 0.0
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * value_after - values[t]
        following = delta + gamma * lam * following
        advantages[t], value_after = following, values[t]
    return advantages


def adapted(kl_coef: float, kl: float, answers: int, options: Ppo) -> float:
    """The next step's coefficient after a step of so many answers that were ``kl`` nats away each, on average
    (arXiv:1909.08593, section 2.2)."""
    if options.kl_target is None:
        return kl_coef
    error = min(max(kl / options.kl_target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * min(answers / options.kl_horizon, 1.0))


def _divergence(options: Ppo, log_probs: np.ndarray, reference: np.ndarray) -> np.ndarray:
    ratio = reference.astype(np.float64) - log_probs.astype(np.float64)
    found: np.ndarray = -ratio if options.kl_estimator == "k1" else np.expm1(ratio) - ratio
    return found


def _variance(values: np.ndarray) -> float:
    return float(values.var(ddof=1)) if len(values) > 1 else 0.0


# --- the loss -------------------------------------------------------------------------------------------------------


def weights(batch: dict[str, Any]) -> tuple[float, ...]:
    """Answer tokens, for the policy's term and for the values'."""
    return (policy.tokens(batch),) * 2


def loss_sums(
    options: Ppo, model: Any, batch: dict[str, Any], head: Head | None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The clipped loss of the policy and that of the values, summed over the tokens.

    Beside ``policy.py``'s, a batch has ``advantages``, ``returns`` and ``values``, (N,) each.
    """
    log_probs, entropy, values = policy.said(model, batch, head, options.temperature, values=True).unbind(-1)
    ratio = torch.exp(log_probs - batch["old"])
    clipped = ratio.clamp(1 - options.cliprange, 1 + options.cliprange)
    plain, limited = -batch["advantages"] * ratio, -batch["advantages"] * clipped
    before, returns = batch["values"], batch["returns"]
    near = before + (values - before).clamp(-options.cliprange_value, options.cliprange_value)
    errors = torch.maximum((values - returns) ** 2, (near - returns) ** 2)
    value_loss = 0.5 * errors.sum()
    told = {
        "tokens": torch.tensor(float(len(ratio)), device=ratio.device),
        "clipped": (limited > plain).double().sum(),
        "values": value_loss.detach().double(),
        "entropy": entropy.double().sum(),
        "moved": (batch["old"] - log_probs).detach().double().sum(),
    }
    return torch.stack([torch.maximum(plain, limited).sum(), options.vf_coef * value_loss]), told


def figures(told: dict[str, torch.Tensor]) -> dict[str, float]:
    """``clip_fraction`` of the tokens, ``value_loss`` and ``entropy`` (nats) per token, ``approx_kl``, nats per token
    that the policy has moved since it wrote the answers; means over the updates."""
    tokens = max(float(told["tokens"]), 1.0)
    names = {"clip_fraction": "clipped", "value_loss": "values", "entropy": "entropy", "approx_kl": "moved"}
    return {name: float(told[key]) / tokens for name, key in names.items()}


def functions(options: Ppo) -> dict[str, Any]:
    """What an ``Objective`` is made of."""
    return {"weights": weights, "loss_sums": partial(loss_sums, options), "figures": figures, "terms": 2}
