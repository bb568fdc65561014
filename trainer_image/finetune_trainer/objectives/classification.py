"""Classification of texts and of words: transformers' own losses, as sums, and how good the predictions are.

A step tells the accuracy; an evaluation more, which is counted on the host (``scores.py``). Pure.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from finetune_trainer import scores
from finetune_trainer.data.labels import MULTI, REGRESSION, Labels
from finetune_trainer.data.stream import IGNORED, Item, collate
from finetune_trainer.objectives.head import Head

_FORWARD = ("input_ids", "attention_mask", "token_type_ids", "tasks")
"""No position_ids: rows are not packed, and RoBERTa counts positions from another number than 0."""
Sums = dict[str, Any]


def collated(with_types: bool) -> Callable[[list[Item], int], dict[str, Any]]:
    """Items as a batch; ``with_types``: with ``token_type_ids`` (B, L), 1 from where their second text begins."""

    def batch_of(items: list[Item], pad_token_id: int) -> dict[str, Any]:
        batch = collate(items, pad_token_id)
        del batch["position_ids"]
        second = batch.pop("second", None)
        if with_types and second is not None:
            place = torch.arange(batch["input_ids"].shape[1])
            batch["token_type_ids"] = ((place >= second[:, None]) & batch["attention_mask"].bool()).long()
        return batch

    return batch_of


def _logits(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    found: torch.Tensor = model(**{key: batch[key] for key in _FORWARD if batch.get(key) is not None}).logits
    return found.float()


# --- texts ----------------------------------------------------------------------------------------------------------


def sequence_weights(labels: Labels) -> Callable[[dict[str, Any]], tuple[float, ...]]:
    """Rows; of several labels, rows times labels."""
    each = len(labels.names) if labels.problem_type == MULTI else 1
    return lambda batch: (float(len(batch["label"]) * each),)


def sequence_loss_sums(labels: Labels) -> Callable[[Any, dict[str, Any], Head | None], tuple[torch.Tensor, Sums]]:
    """Of ``label``: (B,) numbers of labels, (B, K) zeros and ones, or (B,) numbers, by problem_type."""
    loss = {MULTI: _several, REGRESSION: _number}.get(labels.problem_type, _one)

    def sums(model: Any, batch: dict[str, Any], head: Head | None = None) -> tuple[torch.Tensor, Sums]:
        del head
        total, told = loss(_logits(model, batch), batch["label"], len(labels.names))
        return total.reshape(1), told

    return sums


def _one(logits: torch.Tensor, wanted: torch.Tensor, labels: int) -> tuple[torch.Tensor, Sums]:
    given = logits.argmax(-1)
    told: Sums = {"hits": _hits(given == wanted)}
    if not torch.is_grad_enabled():
        told["confusion"] = torch.from_numpy(scores.confusion(_host(wanted), _host(given), labels))
    return cross_entropy(logits, wanted, reduction="sum"), told


def _several(logits: torch.Tensor, wanted: torch.Tensor, labels: int) -> tuple[torch.Tensor, Sums]:
    given = logits > 0  # a probability above one half
    told: Sums = {"hits": _hits((given == wanted.bool()).all(-1))}
    if not torch.is_grad_enabled():
        told["overlaps"] = torch.from_numpy(scores.overlaps(_host(wanted.bool()), _host(given)))
    return binary_cross_entropy_with_logits(logits, wanted.float(), reduction="sum"), told


def _number(logits: torch.Tensor, wanted: torch.Tensor, labels: int) -> tuple[torch.Tensor, Sums]:
    given = logits.squeeze(-1)
    told: Sums = {}
    if not torch.is_grad_enabled():
        told["rows"] = torch.stack([wanted.float(), given], -1)
    return mse_loss(given, wanted.float(), reduction="sum"), told


def _hits(right: torch.Tensor) -> torch.Tensor:
    return torch.stack([right.sum(), torch.tensor(right.numel(), device=right.device)])


def _host(values: torch.Tensor) -> np.ndarray:
    found: np.ndarray = values.cpu().numpy()
    return found


def sequence_figures(sums: Sums) -> dict[str, float]:
    """accuracy; of an evaluation also what :mod:`scores` makes of the counts."""
    if "confusion" in sums:
        return scores.of_confusion(sums["confusion"].numpy())
    if "overlaps" in sums:
        return scores.of_overlaps(sums["overlaps"].numpy())
    return _accuracy(sums)


def _accuracy(sums: Sums) -> dict[str, float]:
    if "hits" not in sums:
        return {}
    hits, rows = sums["hits"].tolist()
    return {"accuracy": hits / max(rows, 1)}


def numbers_figures(rows: np.ndarray) -> dict[str, float]:
    """Of (N, 2) wanted and given numbers."""
    return scores.of_numbers(rows[:, 0], rows[:, 1])


# --- words ----------------------------------------------------------------------------------------------------------


def token_weights(batch: dict[str, Any]) -> tuple[float, ...]:
    """Words: the first token of each carries its label."""
    return (float((batch["labels"] != IGNORED).sum()),)


def token_loss_sums(labels: Labels) -> Callable[[Any, dict[str, Any], Head | None], tuple[torch.Tensor, Sums]]:
    """Of ``labels`` (B, T), -100 where no word begins."""
    kinds = entity_types(labels.names)

    def sums(model: Any, batch: dict[str, Any], head: Head | None = None) -> tuple[torch.Tensor, Sums]:
        del head
        wanted = batch["labels"]
        # Prompt methods put virtual tokens before the sequence.
        logits = _logits(model, batch)[:, -wanted.shape[1] :]
        loss = cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="sum")
        given, there = logits.argmax(-1), wanted != IGNORED
        told: Sums = {"hits": torch.stack([((given == wanted) & there).sum(), there.sum()])}
        if not torch.is_grad_enabled():
            right, ours, places = _host(wanted), _host(given), _host(there)
            told["confusion"] = torch.from_numpy(scores.confusion(right[places], ours[places], len(labels.names)))
            if kinds:
                told["entities"] = torch.from_numpy(_entities(right, ours, places, labels.names, kinds))
        return loss.reshape(1), told

    return sums


def entity_types(names: tuple[str, ...]) -> list[str]:
    """The types of entities that IOB tags name; none where the tags are of another kind."""
    if not all(name == "O" or name[:2] in ("B-", "I-") for name in names):
        return []
    return sorted({name[2:] for name in names if name != "O"})


def _entities(
    wanted: np.ndarray, given: np.ndarray, places: np.ndarray, names: tuple[str, ...], kinds: list[str]
) -> np.ndarray:
    total = np.zeros((len(kinds), 3), np.int64)
    for row in range(len(wanted)):
        right, ours = ([names[tag] for tag in side[row][places[row]]] for side in (wanted, given))
        total += scores.entity_counts(right, ours, kinds)
    return total


def token_figures(labels: Labels) -> Callable[[Sums], dict[str, float]]:
    """accuracy; of an evaluation precision, recall and f1 of entities, or f1_macro of tags that are none."""
    kinds = entity_types(labels.names)

    def figures(sums: Sums) -> dict[str, float]:
        if "entities" in sums:
            return _accuracy(sums) | scores.of_entities(sums["entities"].numpy(), kinds)
        return scores.of_confusion(sums["confusion"].numpy()) if "confusion" in sums else _accuracy(sums)

    return figures


# --- what an ``Objective`` is made of -------------------------------------------------------------------------------


def functions(stage: str, labels: Labels, tokenizer: Any) -> dict[str, Any]:
    """Of a stage with labels."""
    made: dict[str, Any] = {"collate": collated("token_type_ids" in tokenizer.model_input_names)}
    if stage == "token_classification":
        more = {"weights": token_weights, "loss_sums": token_loss_sums(labels), "figures": token_figures(labels)}
        return made | more | {"labels": labels.names}
    made |= {"weights": sequence_weights(labels), "loss_sums": sequence_loss_sums(labels), "figures": sequence_figures}
    if labels.problem_type == REGRESSION:
        return made | {"of_rows": numbers_figures}
    return made | ({} if labels.problem_type == MULTI else {"labels": labels.names})
