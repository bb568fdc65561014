"""Mix-and-match adapter (arXiv:2110.04366): a prefix in attention, a scaled parallel adapter beside the feed-forward.

With packing every document sees the prefix as if it were alone. The reparametrisation of the prefix is trained and
saved with it.
"""

from torch import nn
from transformers import PreTrainedModel

from finetune_api.methods import Mam, Unipelt
from finetune_api.run import TrainerConfig
from finetune_trainer.methods import bottleneck, parts
from finetune_trainer.methods.places import layers
from finetune_trainer.model import enable_gradient_checkpointing, head_of

save = parts.write
merge = bottleneck.merge


def prepare(model: PreTrainedModel, method: Mam, config: TrainerConfig) -> nn.Module:
    """The model with prefixes and adapters, which alone are trainable."""
    if config.training.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    inject(model, method)
    parts.train_head(model, head_of(model))
    return model


def inject(model: PreTrainedModel, method: Mam) -> None:
    """Freeze the model and attach new parts. RunError(INVALID_CONFIGURATION) for an unknown architecture."""
    places = list(layers(model))
    model.requires_grad_(False)
    width = int(model.config.hidden_size)
    trunk = new_trunk(model, method)
    for layer, stack in places:
        for attention in stack.attentions:
            parts.attach_prefix(layer, attention, new_prefix(model, method, trunk))
        update = parts.Adapter(
            width, method.bottleneck_size, method.non_linearity, method.adapter_dropout, method.scaling, "lora"
        )
        parts.attach_parallel(
            layer.get_submodule(stack.feed_forward_input),
            layer.get_submodule(stack.feed_forward_output),
            update.to(model.device),
        )
    parts.use_prefixes(model)


def new_trunk(model: PreTrainedModel, method: Mam | Unipelt) -> parts.Trunk | None:
    """What the prefixes are projected from, as a part of the model; None where they are weights themselves."""
    if not method.prefix_projection:
        return None
    width = int(model.config.hidden_size)
    trunk = parts.Trunk(method.num_virtual_tokens, width, method.encoder_hidden_size or width)
    model.base_model.add_module("prefix_trunk", trunk.to(model.device))
    return trunk


def new_prefix(model: PreTrainedModel, method: Mam | Unipelt, trunk: parts.Trunk | None) -> parts.Prefix:
    """The prefix of one attention."""
    return parts.Prefix(method.num_virtual_tokens, *parts.head_shape(model.config), trunk).to(model.device)
