"""UniPELT (arXiv:2110.07577): LoRA of query and value, a prefix and an adapter, each behind a learned gate per layer.

``G_L`` and ``G_P`` are of the attention's input, ``G_A`` of the adapter's, which is what the feed-forward puts out; all
are per token (``parts.Gate`` says why). Instead of alpha / r, LoRA's scaling is its gate.
"""

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from finetune_api.methods import Unipelt
from finetune_api.run import TrainerConfig
from finetune_trainer.hooks import Hooks
from finetune_trainer.methods import bottleneck, parts
from finetune_trainer.methods.mam import new_prefix, new_trunk
from finetune_trainer.methods.places import layers
from finetune_trainer.model import enable_gradient_checkpointing, head_of

save = parts.write
merge = bottleneck.merge


def prepare(model: PreTrainedModel, method: Unipelt, config: TrainerConfig) -> nn.Module:
    """The model with the three parts and their gates, which alone are trainable."""
    if config.training.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    inject(model, method)
    parts.train_head(model, head_of(model))
    return model


def inject(model: PreTrainedModel, method: Unipelt) -> None:
    """Freeze the model and attach new parts. RunError(INVALID_CONFIGURATION) for an unknown architecture."""
    places = list(layers(model))
    model.requires_grad_(False)
    width, device = int(model.config.hidden_size), model.device
    trunk = new_trunk(model, method)
    for layer, stack in places:
        for attention in stack.attentions:
            prefix = new_prefix(model, method, trunk)
            prefix.gate = parts.Gate(width).to(device)
            parts.attach_prefix(layer, attention, prefix)
            gate = parts.Gate(width).to(device)
            layer.get_submodule(attention.module).add_module("lora_gate", gate)
            parts.attach_query_value(
                layer,
                attention,
                lambda inputs, outputs, gate=gate: parts.LowRank(  # type: ignore[misc]
                    inputs, outputs, method.r, method.lora_dropout, gate
                ).to(device),
            )
        update = parts.Adapter(width, method.bottleneck_size, method.non_linearity, method.adapter_dropout, 1.0, "lora")
        update.gate = parts.Gate(width)
        parts.attach_sequential(layer.get_submodule(stack.feed_forward_output), update.to(device))
    parts.use_prefixes(model)


def hooks(model: nn.Module, method: Unipelt, max_steps: int) -> Hooks:
    """The gates, for metrics.jsonl and Prometheus."""
    del method, max_steps
    return Hooks(figures=lambda: figures(model))


def figures(model: nn.Module) -> dict[str, float]:
    """``gate_adapter/0`` …: every part's mean gate by layer, and ``gate_adapter`` … over all layers.

    Of the tokens of the last forward pass in training on each process. Collective.
    """
    kinds = {"adapter.gate": "adapter", "prefix.gate": "prefix", "lora_gate": "lora"}
    found: dict[str, list[torch.Tensor]] = {kind: [] for kind in kinds.values()}
    for name, module in model.named_modules():
        if isinstance(module, parts.Gate):
            found[next(kind for ending, kind in kinds.items() if name.endswith(ending))].append(module.mean.float())
    means = torch.cat([torch.stack(each) for each in found.values()])
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(means)
        means /= dist.get_world_size()
    values = iter(means.tolist())
    result: dict[str, float] = {}
    for kind, each in found.items():
        by_layer = [next(values) for _ in each]
        result[f"gate_{kind}"] = round(sum(by_layer) / len(by_layer), 6)
        result |= {f"gate_{kind}/{number}": round(value, 6) for number, value in enumerate(by_layer)}
    return result
