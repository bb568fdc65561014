"""Supervised fine-tuning: cross-entropy of the next token, over the tokens that carry a label.

Equal to TRL's and transformers' loss times their number of label tokens. Pure: nothing is kept between calls.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from finetune_trainer import scores
from finetune_trainer.objectives.head import Head

IGNORED = -100
"""The label of a token that is not learned."""

FORWARD = ("input_ids", "attention_mask", "position_ids", "tasks")
"""What of a batch the model is given."""


def targets(batch: dict[str, Any]) -> torch.Tensor:
    """(B, T - 1) the token each position must predict, ``IGNORED`` where none is learned.

    The first token of a document (position 0) is nobody's next token: in packed rows it follows another document.
    """
    labels = batch["labels"]
    positions = batch.get("position_ids")
    if positions is not None:
        labels = labels.masked_fill(positions == 0, IGNORED)
    return labels[..., 1:]


def weights(batch: dict[str, Any]) -> tuple[float, ...]:
    """Number of label tokens."""
    return (float((targets(batch) != IGNORED).sum()),)


def prepare(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with the places that carry a label, found on the host: looking for them on the GPU would make the
    host wait for it. Adds ``places`` (N,) into the flattened (B x T) and ``wanted`` (N,), the tokens there."""
    wanted = targets(batch)
    width = wanted.shape[-1]
    places = (wanted.reshape(-1) != IGNORED).nonzero().squeeze(-1)
    if not len(places):  # every process needs a loss with a graph
        places = torch.zeros(1, dtype=torch.long)
    found = wanted.reshape(-1)[places]
    return batch | {"places": places + places // width, "wanted": found}


def loss_sums(
    model: Any, batch: dict[str, Any], head: Head | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """fp32 (1,): the cross-entropy in nats, summed over the label tokens of a prepared batch (B, T)."""
    return token_losses(model, batch, head).sum().reshape(1), {}


def by_position(ends: Sequence[int]) -> dict[str, Any]:
    """``prepare``, ``loss_sums`` and ``figures`` of an objective whose evaluations also tell the perplexity of each
    stretch of positions: up to the first of the rising ``ends``, from there up to the second … They count from 1 at the
    beginning of a document."""
    bounds = torch.tensor(ends[:-1])  # nothing is longer than the last one

    def prepared(batch: dict[str, Any]) -> dict[str, Any]:
        batch = prepare(batch)
        before = batch["position_ids"].reshape(-1)[batch["places"]]
        return batch | {"stretch": torch.bucketize(before + 2, bounds)}  # the token after it, counted from 1

    def sums(model: Any, batch: dict[str, Any], head: Head | None = None) -> tuple[torch.Tensor, dict[str, Any]]:
        losses = token_losses(model, batch, head)
        if torch.is_grad_enabled():
            return losses.sum().reshape(1), {}
        learned = (batch["wanted"] != IGNORED).to(losses)
        told = losses.new_zeros(2, len(ends))
        told.index_add_(1, batch["stretch"], torch.stack([losses * learned, learned]))
        return losses.sum().reshape(1), {"by_position": told}

    def figures(told: dict[str, Any]) -> dict[str, float]:
        if "by_position" not in told:
            return {}
        stretches = zip(ends, *told["by_position"].tolist(), strict=True)
        return {f"perplexity_to_{end}": scores.perplexity(loss / n) for end, loss, n in stretches if n}

    return {"prepare": prepared, "loss_sums": sums, "figures": figures}


def token_losses(model: Any, batch: dict[str, Any], head: Head | None = None) -> torch.Tensor:
    """fp32 (N,): the cross-entropy in nats at each of the N places of a prepared batch."""
    inputs = {key: batch[key] for key in FORWARD if batch.get(key) is not None}
    return losses_at(model, inputs, batch["input_ids"].shape[-1], batch["places"], batch["wanted"], head)


def losses_at(
    model: Any, inputs: dict[str, Any], width: int, places: torch.Tensor, wanted: torch.Tensor, head: Head | None
) -> torch.Tensor:
    """fp32 (N,): the cross-entropy of ``wanted`` at ``places`` of the model's flattened (B x ``width``) outputs.

    ``head``: the model's output layer, where it may give the losses itself, of these places only.
    """
    if head is None:
        outputs = model(**inputs, use_cache=False).logits[..., -width:, :]
        outputs = outputs.reshape(-1, outputs.shape[-1])[places]
        return cross_entropy(outputs.float(), wanted, ignore_index=IGNORED, reduction="none")
    with head.losing(width, places, wanted):
        losses: torch.Tensor = model(**inputs, use_cache=False).logits.reshape(-1)
    return losses
