"""LoRA, and QLoRA, which differs only in how ``model.py`` loads the base. The result is a PEFT adapter."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune_api.causes import Cause
from finetune_api.methods import Lora
from finetune_api.run import TrainerConfig
from finetune_trainer.adapter_files import WEIGHTS
from finetune_trainer.hooks import NOTHING, Hooks
from finetune_trainer.methods import adapters
from finetune_trainer.methods.adapters import attach, linear_names
from finetune_trainer.methods.adapters import merge as merge
from finetune_trainer.model import kind_of
from finetune_trainer.outcome import RunError

KEPT = ("default", "gaussian", "orthogonal")
"""The values of ``init_lora_weights`` with which the adapted model begins as the base, its weights untouched."""


def prepare(model: PreTrainedModel, method: Lora, config: TrainerConfig) -> nn.Module:
    """The model with adapters, which alone are trainable (with ``modules_to_save``)."""
    chosen = method.model_dump(
        exclude={"type", "loraplus_lr_ratio", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant"}
    )
    if method.init_lora_weights == "default":
        chosen["init_lora_weights"] = True
    chosen["layers_to_transform"] = method.layers_to_transform or None
    if method.layers_to_transform and method.target_modules == "all-linear":
        # PEFT takes numbers of layers only with a list of names, and lets a name outside all layers through.
        chosen["target_modules"] = linear_names(model, in_layers=True)
    if method.init_lora_weights == "olora" and any(type(m).__name__ == "Conv1D" for m in model.modules()):
        raise RunError(
            Cause.INVALID_CONFIGURATION,
            f"method.init_lora_weights 'olora' does not go with {type(model).__name__}, whose weights are turned round "
            "(Conv1D). Choose pissa or default.",
        )
    adapted = attach(model, LoraConfig, chosen, config)
    if method.init_lora_weights not in KEPT:
        # These took their first values out of the model's weights: what was learned is the difference to them.
        adapted._first_lora = {  # type: ignore[assignment]
            name: value.detach().cpu().clone()
            for name, value in get_peft_model_state_dict(adapted, save_embedding_layers=False).items()
        }
    return adapted


def hooks(model: nn.Module, method: Lora, max_steps: int) -> Hooks:
    """LoRA+: B learns faster than A."""
    del model, max_steps
    ratio = method.loraplus_lr_ratio
    if ratio == 1:
        return NOTHING
    # As PEFT's create_loraplus_optimizer: with B goes what has one dimension (DoRA's magnitudes).
    fast = (".lora_B.", ".lora_embedding_B.", ".lora_magnitude_vector.")
    return Hooks(learning_rate_ratio=lambda name: ratio if any(part in name for part in fast) else 1.0)


def save(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    state_dict: dict[str, torch.Tensor] | None,
    config: TrainerConfig,
) -> None:
    """Write adapter and tokenizer into ``directory``, for ``PeftModel.from_pretrained``."""
    first: dict[str, torch.Tensor] | None = getattr(model, "_first_lora", None)
    if first is None:
        adapters.save(model, tokenizer, directory, state_dict, config)
        return
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    if kind_of(config.stage).new_head:
        adapters.write_labels(model, directory)
    last = get_peft_model_state_dict(model, state_dict=state_dict, save_embedding_layers=False)
    save_file(plain_weights(first, last), directory / WEIGHTS, metadata={"format": "pt"})
    trained: Any = model.peft_config["default"]
    plain_config(trained).save_pretrained(str(directory))
    tokenizer.save_pretrained(directory)


def plain_weights(first: dict[str, torch.Tensor], last: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A LoRA over the original model from one over a model that gave B0·A0 away: [B, B0]·[A, -A0], of twice the rank.

    The model was W - s·B0·A0 and became W - s·B0·A0 + s·B·A.
    """
    found = {}
    for name, value in last.items():
        value = value.detach().cpu()
        if ".lora_A." in name:
            value = torch.cat([value, -first[name].to(value)], dim=0)
        elif ".lora_B." in name:
            value = torch.cat([value, first[name].to(value)], dim=1)
        found[name] = value.contiguous()
    return found


def plain_config(trained: LoraConfig) -> LoraConfig:
    """The configuration of :func:`plain_weights`: twice the rank, the scaling of before."""
    written: LoraConfig = deepcopy(trained)
    written.inference_mode = True
    written.init_lora_weights = True
    growth = 2**0.5 if trained.use_rslora else 2
    written.r = 2 * trained.r
    written.lora_alpha = growth * trained.lora_alpha  # type: ignore[assignment]
    written.rank_pattern = {name: 2 * rank for name, rank in (trained.rank_pattern or {}).items()}
    written.alpha_pattern = {name: growth * alpha for name, alpha in (trained.alpha_pattern or {}).items()}
    return written
