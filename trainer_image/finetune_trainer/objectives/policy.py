"""What a policy says of answers that it or an earlier version of it has written: the shared part of ppo and grpo. Pure.

A batch holds B answers behind their prompts, as ``data.collate`` lays sequences out; the label tokens are the answers.
Of its N answer tokens it has, one answer after the other, ``old`` (N,), their log-probabilities when they were written,
and what each stage adds; ``lengths`` is a list, the tokens of each answer.
"""

from typing import Any

import torch

from finetune_trainer.objectives import sft
from finetune_trainer.objectives.head import Head, log_probs

VALUE_HEAD = "value_head"
"""The module of a policy that tells what reward is still to come: (N, width) to (N, 1)."""


def said(model: Any, batch: dict[str, Any], head: Head | None, temperature: float, *, values: bool) -> torch.Tensor:
    """fp32 (N, 2): log-probability and entropy at every answer token; with ``values`` (N, 3), and the value before it.

    Probabilities are those at ``temperature``. The entropy has no graph.
    """
    inputs = {key: batch[key] for key in sft.FORWARD if batch.get(key) is not None}
    width, places, wanted = batch["input_ids"].shape[-1], batch["places"], batch["wanted"]
    if head is None:
        output = model(**inputs, use_cache=False, output_hidden_states=values)
        told = log_probs(_at(output.logits, width, places), wanted, temperature)
        if values:
            told = torch.cat([told, _values(model, _at(output.hidden_states[-1], width, places))], -1)
        return told

    def make(rows: torch.Tensor) -> torch.Tensor:
        told = head.log_probs(rows, wanted, temperature)
        return torch.cat([told, _values(model, rows)], -1) if values else told

    with head.giving(width, places, make):
        found: torch.Tensor = model(**inputs, use_cache=False).logits.squeeze(0)
    return found


def _at(outputs: torch.Tensor, width: int, places: torch.Tensor) -> torch.Tensor:
    # Prompt methods put virtual tokens before the sequence.
    return outputs[..., -width:, :].reshape(-1, outputs.shape[-1])[places]


def _values(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    layer = getattr(getattr(model, "module", model), VALUE_HEAD)
    with torch.autocast(hidden.device.type, enabled=False):
        found: torch.Tensor = layer(hidden.to(layer.weight.dtype)).float()
    return found


def tokens(batch: dict[str, Any]) -> float:
    """Answer tokens of a batch."""
    return float(sum(batch["lengths"]))


def by_answer(values: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
    """(B,): values (N,) of the answer tokens, summed by answer, in a fixed order."""
    return torch.stack([part.sum() for part in values.split(batch["lengths"])])
