"""What a language model says of whole answers: the shared part of dpo, kto and orpo. Pure.

Batches hold S sequences of T tokens, as ``data.collate`` lays them out: of B pairs the B better answers first, then the
B worse ones. The label tokens of a sequence are its answer.
"""

from typing import Any

import torch

from finetune_trainer.objectives import sft
from finetune_trainer.objectives.head import Head


def lengths(batch: dict[str, Any]) -> torch.Tensor:
    """int64 (S,): label tokens of each sequence."""
    return (sft.targets(batch) != sft.IGNORED).sum(-1)


def prepare(batch: dict[str, Any]) -> dict[str, Any]:
    """As sft's, and ``lengths`` (S,)."""
    return sft.prepare(batch) | {"lengths": lengths(batch)}


def sums(values: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
    """(S,): values (N,) at the places of a prepared batch, summed by sequence.

    Through a grid of (S x T): adding up with ``index_add`` has no fixed order on a GPU.
    """
    shape = batch["input_ids"].shape
    grid = values.new_zeros(shape[0] * shape[1]).index_put((batch["places"],), values)
    return grid.reshape(shape).sum(-1)


def log_probs(model: Any, batch: dict[str, Any], head: Head | None) -> torch.Tensor:
    """fp32 (S,): the log-probability of each answer, in nats."""
    return sums(-sft.token_losses(model, batch, head), batch)


def reference(model: Any, batch: dict[str, Any], head: Head | None) -> torch.Tensor:
    """fp32 (B, P): :func:`log_probs`, item by item."""
    return by_item(log_probs(model, batch, head), batch)


def by_item(values: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
    """(B, P): values by sequence (P x B), item by item. The first number of a batch tells B."""
    return values.reshape(-1, batch["items"]).T


def compared(better: torch.Tensor, worse: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sums for :func:`figures`: what the model holds of the better and the worse answers, (B,) each."""
    better, worse = better.detach().double(), worse.detach().double()
    return {
        "pairs": torch.tensor(float(len(better)), dtype=torch.float64, device=better.device),
        "correct": (better > worse).double().sum(),
        "chosen": better.sum(),
        "rejected": worse.sum(),
    }


def figures(told: dict[str, torch.Tensor]) -> dict[str, float]:
    """``accuracy``, the share of pairs whose better answer gets more; ``margin``, by how much on average;
    ``reward_chosen`` and ``reward_rejected``."""
    pairs = max(float(told["pairs"]), 1.0)
    chosen, rejected = float(told["chosen"]) / pairs, float(told["rejected"]) / pairs
    return {
        "accuracy": float(told["correct"]) / pairs,
        "margin": chosen - rejected,
        "reward_chosen": chosen,
        "reward_rejected": rejected,
    }
