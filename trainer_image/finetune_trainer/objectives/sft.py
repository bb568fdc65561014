"""Supervised fine-tuning: cross-entropy of the next token, over the tokens that carry a label.

Equal to TRL's and transformers' loss times their number of label tokens. Pure: nothing is kept between calls.
"""

from typing import Any

import torch
from torch.nn.functional import cross_entropy

IGNORED = -100
"""The label of a token that is not learned."""

FORWARD_KEYS = ("input_ids", "attention_mask", "position_ids")


def targets(batch: dict[str, Any]) -> torch.Tensor:
    """(B, T - 1) the token each position must predict, ``IGNORED`` where none is learned.

    The first token of a document (position 0) is nobody's next token: in packed rows it follows another document.
    """
    labels = batch["labels"]
    positions = batch.get("position_ids")
    if positions is not None:
        labels = labels.masked_fill(positions == 0, IGNORED)
    return labels[..., 1:]


def weight(batch: dict[str, Any]) -> int:
    """Number of label tokens."""
    return int((targets(batch) != IGNORED).sum())


def forward_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """What of a batch the model takes."""
    return {key: batch[key] for key in FORWARD_KEYS if batch.get(key) is not None}


def loss_sum(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Scalar fp32: the cross-entropy in nats, summed over the label tokens of a batch (B, T)."""
    logits = model(**forward_inputs(batch), use_cache=False).logits
    wanted = targets(batch).to(logits.device)
    # Prompt methods put virtual tokens before the sequence; their logits predict nothing.
    logits = logits[..., -(wanted.shape[-1] + 1) : -1, :]
    return cross_entropy(
        logits.reshape(-1, logits.shape[-1]).float(), wanted.reshape(-1), ignore_index=IGNORED, reduction="sum"
    )
