"""Full fine-tuning: every weight is trained, the result is a model."""

from pathlib import Path
from typing import NoReturn

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune_api.causes import Cause
from finetune_api.methods import Full
from finetune_api.run import TrainerConfig
from finetune_trainer.model import enable_gradient_checkpointing, save_model
from finetune_trainer.outcome import RunError


def prepare(model: PreTrainedModel, method: Full, config: TrainerConfig) -> nn.Module:
    """The model itself, all of it trainable."""
    del method
    model.requires_grad_(True)
    if config.training.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    return model


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    state_dict: dict[str, torch.Tensor] | None,
    config: TrainerConfig,
) -> None:
    """Write model and tokenizer into ``directory``."""
    save_model(model, tokenizer, directory, config.max_shard_size, state_dict)


def merge(model_path: Path, adapter_dir: Path, out_dir: Path, config: TrainerConfig) -> NoReturn:
    """There is nothing to merge."""
    del model_path, adapter_dir, out_dir
    raise RunError(
        Cause.INVALID_CONFIGURATION,
        f"output.merge is for adapters; method.type {config.method.type!r} already writes a whole model. "
        "Set it to false.",
    )
