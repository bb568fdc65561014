"""Bottleneck adapters: Houlsby (arXiv:1902.00751), Pfeiffer (arXiv:2005.00247) and parallel (arXiv:2110.04366).

The model is frozen (Houlsby trains its layer norms too).
"""

from pathlib import Path
from typing import NoReturn

from torch import nn
from transformers import PreTrainedModel

from finetune_api.causes import Cause
from finetune_api.methods import BottleneckAdapter
from finetune_api.run import TrainerConfig
from finetune_trainer.methods import parts
from finetune_trainer.methods.places import layers
from finetune_trainer.model import enable_gradient_checkpointing, head_of
from finetune_trainer.outcome import RunError

save = parts.write


def prepare(model: PreTrainedModel, method: BottleneckAdapter, config: TrainerConfig) -> nn.Module:
    """The model with adapters, which alone are trainable (with the norms, for Houlsby)."""
    if config.training.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    inject(model, method)
    parts.train_head(model, head_of(model))
    return model


def inject(model: PreTrainedModel, method: BottleneckAdapter) -> None:
    """Freeze the model and attach new adapters. RunError(INVALID_CONFIGURATION) for an unknown architecture."""
    places = list(layers(model))
    model.requires_grad_(False)

    def adapter() -> parts.Adapter:
        return parts.Adapter(
            int(model.config.hidden_size),
            method.bottleneck_size,
            method.non_linearity,
            method.adapter_dropout,
            method.scaling,
            method.adapter_init,
        ).to(model.device)

    for layer, stack in places:
        last = layer.get_submodule(stack.feed_forward_output)
        if method.adapter_variant == "parallel":
            parts.attach_parallel(layer.get_submodule(stack.feed_forward_input), last, adapter())
            continue
        parts.attach_sequential(last, adapter())
        if method.adapter_variant == "houlsby":
            for attention in stack.attentions:
                parts.attach_sequential(layer.get_submodule(attention.output), adapter())
            parts.train_norms(layer, stack)


def merge(model_path: Path, adapter_dir: Path, out_dir: Path, config: TrainerConfig) -> NoReturn:
    """What is not linear cannot be folded into weights."""
    del model_path, adapter_dir, out_dir
    raise RunError(
        Cause.INVALID_CONFIGURATION,
        f"output.merge does not go with method.type {config.method.type!r}: its part is not linear in the input and "
        "cannot be folded into the weights. Set it to false and load the adapter beside the model "
        "(finetune_trainer.methods.load_adapter), or use method.type: lora.",
    )
