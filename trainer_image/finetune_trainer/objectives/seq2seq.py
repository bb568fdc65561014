"""Texts made of texts: cross-entropy of the decoder's next token, over the tokens of the target.

Equal to transformers' loss of an encoder-decoder times the number of label tokens. In an evaluation with
``predict_with_generate`` the model also writes every target.
"""

from collections.abc import Callable
from typing import Any

import torch

from finetune_api.run import TrainerConfig
from finetune_api.stages import Seq2Seq
from finetune_trainer import scores
from finetune_trainer.data.stream import IGNORED, Item, collate
from finetune_trainer.generate import written
from finetune_trainer.objectives.head import Head
from finetune_trainer.objectives.sft import losses_at

_FORWARD = ("input_ids", "attention_mask", "tasks")
Sums = dict[str, Any]


def collated(items: list[Item], pad_token_id: int) -> dict[str, Any]:
    """Items of a source and a target as a batch: ``input_ids`` and ``attention_mask`` (B, S), ``labels`` (B, T),
    ``tasks`` (B, 1) where the method knows tasks."""
    sources, targets = (
        collate([Item((item.sequences[part],), item.rows) for item in items], pad_token_id) for part in (0, 1)
    )
    batch = {key: sources[key] for key in ("input_ids", "attention_mask")}
    batch["labels"] = targets["labels"]
    batch["num_tokens"] = sources["num_tokens"] + targets["num_tokens"]
    if "tasks" in sources:
        batch["tasks"] = sources["tasks"][:, :1]
    return batch


def weights(batch: dict[str, Any]) -> tuple[float, ...]:
    """Tokens of the targets."""
    return (float((batch["labels"] != IGNORED).sum()),)


def prepare(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with ``places`` (N,) of the label tokens in the flattened (B x T), and ``wanted`` (N,), the tokens."""
    flat = batch["labels"].reshape(-1)
    places = (flat != IGNORED).nonzero().squeeze(-1)
    return batch | {"places": places, "wanted": flat[places]}


def shifted(labels: torch.Tensor, config: Any) -> torch.Tensor:
    """(B, T): what the decoder reads: its start token, and then the target but for the last one."""
    start = config.decoder_start_token_id
    before = labels.new_full(labels.shape, start if start is not None else config.pad_token_id)
    before[:, 1:] = labels[:, :-1].masked_fill(labels[:, :-1] == IGNORED, config.pad_token_id)
    return before


def loss_sums(
    config: TrainerConfig, tokenizer: Any
) -> Callable[[Any, dict[str, Any], Head | None], tuple[torch.Tensor, Sums]]:
    """Over the label tokens of a prepared batch."""

    def sums(model: Any, batch: dict[str, Any], head: Head | None = None) -> tuple[torch.Tensor, Sums]:
        inputs: dict[str, Any] = {key: batch[key] for key in _FORWARD if key in batch}
        inputs["decoder_input_ids"] = shifted(batch["labels"], model.config)
        width = batch["labels"].shape[-1]
        loss = losses_at(model, inputs, width, batch["places"], batch["wanted"], head).sum()
        if torch.is_grad_enabled() or not config.evaluation.predict_with_generate:
            return loss.reshape(1), {}
        return loss.reshape(1), {"texts": _written(config, tokenizer, model, batch)}

    return sums


def _written(config: TrainerConfig, tokenizer: Any, model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Counts over the rows of what the model writes."""
    asked, section = config.evaluation, config.seq2seq or Seq2Seq()
    output = written(
        getattr(model, "module", model),
        tokenizer,
        {key: batch[key] for key in ("input_ids", "attention_mask")},
        together=config.deepspeed.get("zero_optimization", {}).get("stage") == 3,
        max_new_tokens=asked.generation_max_length or section.max_target_length,
        num_beams=asked.generation_num_beams,
    )
    given = tokenizer.batch_decode(output, skip_special_tokens=True)
    labels = batch["labels"]
    wanted = tokenizer.batch_decode(
        labels.masked_fill(labels == IGNORED, tokenizer.pad_token_id), skip_special_tokens=True
    )
    return torch.from_numpy(sum(scores.text_counts(*pair) for pair in zip(wanted, given, strict=True)))


def figures(sums: Sums) -> dict[str, float]:
    """ROUGE and BLEU, where the model has written."""
    return scores.of_texts(sums["texts"].numpy()) if "texts" in sums else {}


def functions(config: TrainerConfig, tokenizer: Any) -> dict[str, Any]:
    """What an ``Objective`` is made of."""
    return {
        "weights": weights,
        "loss_sums": loss_sums(config, tokenizer),
        "figures": figures,
        "prepare": prepare,
        "collate": collated,
    }
