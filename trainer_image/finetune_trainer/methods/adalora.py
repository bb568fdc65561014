"""AdaLoRA: updates U·diag(E)·V whose ranks are given where they matter most, while training (arXiv:2303.10512).

PEFT has the layers and the allocator; here are its place in the step, its regulariser, and its memory in checkpoints:
two running means per weight, and which ranks were taken away last. The result is a PEFT adapter.
"""

from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune_api.causes import Cause
from finetune_api.methods import Adalora
from finetune_api.run import TrainerConfig
from finetune_trainer.hooks import Hooks
from finetune_trainer.methods import adapters
from finetune_trainer.methods.adapters import attach
from finetune_trainer.methods.adapters import merge as merge
from finetune_trainer.outcome import RunError
from finetune_trainer.zero import is_plain

UNKNOWN = 1_000_000_000
"""PEFT wants the number of steps at once; ``hooks`` tells it the true one."""
MEANS = ("exp_avg_ipt", "exp_avg_unc")
"""PEFT's running means of a weight's importance and of its uncertainty."""
KEPT = "kept_ranks"
"""1 for every rank that is left, 0 for those taken away; in the shape of E."""


def prepare(model: PreTrainedModel, method: Adalora, config: TrainerConfig) -> nn.Module:
    """The model with adapters of rank ``init_r``, which alone are trainable (with ``modules_to_save``)."""
    if not is_plain(config):
        raise RunError(
            Cause.INVALID_CONFIGURATION,
            "method.type 'adalora' needs every process to hold all weights and gradients: no ZeRO stage above 0 and no "
            "bf16 section. Remove spec.deepspeed.bf16 and zero_optimization.stage.",
        )
    chosen = method.model_dump(exclude={"type"})
    return attach(model, AdaLoraConfig, chosen | {"total_step": UNKNOWN}, config)


def hooks(model: Any, method: Adalora, max_steps: int) -> Hooks:
    """Regulariser, allocation after each update, memory, ranks. RunError where no step is left to give ranks in."""
    if method.tinit + method.tfinal >= max_steps:
        raise RunError(
            Cause.INVALID_CONFIGURATION,
            f"method.tinit {method.tinit} and tfinal {method.tfinal} leave no step of the run's {max_steps} in which "
            f"ranks are given. Accepted: tinit + tfinal less than {max_steps}. Lower them, or train longer.",
        )
    written = model.peft_config["default"]
    written.total_step = max_steps
    vectors = [(name, p) for name, p in model.named_parameters() if ".lora_A." in name or ".lora_B." in name]
    return Hooks(
        extra_loss=(lambda: method.orth_reg_weight * regulariser(vectors)) if method.orth_reg_weight else None,
        after_update=lambda step: allocate(model, step),
        statistics=lambda: memory(model),
        figures=lambda: ranks(model),
    )


def regulariser(vectors: list[tuple[str, nn.Parameter]]) -> torch.Tensor:
    """Mean over all A and B of the Frobenius norm of A·Aᵀ - 1 and Bᵀ·B - 1: as PEFT's ``AdaLoraModel.forward``."""
    total = vectors[0][1].new_zeros(())
    with torch.autocast(total.device.type, enabled=False):
        for name, p in vectors:
            product = p @ p.T if ".lora_A." in name else p.T @ p
            total = total + torch.norm(product - torch.eye(len(product), device=p.device, dtype=p.dtype), p="fro")
    return total / len(vectors)


def allocate(model: Any, step: int) -> None:
    """Note the importance of every weight, and take ranks away where the schedule says so. ``step`` from 1.

    After the optimizer, as PEFT documents it: what is masked before would be moved away from 0 again.
    """
    kept = _kept(model)
    written = model.peft_config["default"]
    # After a restart the pattern of the final phase is known to us only.
    written.rank_pattern = {name: mask.view(-1).bool().tolist() for name, mask in kept.items()}
    model.base_model.update_and_allocate(step)
    for name, pattern in written.rank_pattern.items():
        kept[name].view(-1).copy_(torch.tensor(pattern))


def memory(model: Any) -> dict[str, dict[str, torch.Tensor]]:
    """What the allocator remembers, by the names of the parameters: made as it makes them where it has not yet."""
    allocator = model.base_model.rankallocator
    found: dict[str, dict[str, torch.Tensor]] = {}
    kept = _kept(model)
    for name, p in model.base_model.model.named_parameters():
        if ".lora_" not in name or not p.requires_grad:
            continue
        for kind in ("ipt", *MEANS):
            getattr(allocator, kind).setdefault(name, torch.zeros_like(p))
        entry = {kind: getattr(allocator, kind)[name] for kind in MEANS}
        if name in kept:
            entry[KEPT] = kept[name]
        found[f"base_model.model.{name}"] = entry
    return found


def ranks(model: Any) -> dict[str, float]:
    """How many ranks are left: all together, the mean per update, the least and the most."""
    left = [float(mask.sum()) for mask in _kept(model).values()]
    return {
        "rank_total": sum(left),
        "rank_mean": sum(left) / len(left),
        "rank_min": min(left),
        "rank_max": max(left),
    }


def save(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    state_dict: dict[str, torch.Tensor] | None,
    config: TrainerConfig,
) -> None:
    """Write adapter and tokenizer into ``directory``; the adapter has only the ranks that are left."""
    written: Any = model.peft_config["default"]
    pattern = {name: mask.view(-1).bool().tolist() for name, mask in _kept(model).items()}
    written.rank_pattern = pattern
    try:
        adapters.save(model, tokenizer, directory, state_dict, config)
    finally:
        written.rank_pattern = pattern  # PEFT writes other names into it


def _kept(model: Any) -> dict[str, torch.Tensor]:
    """The masks of all E, by the names the allocator gives them."""
    masks: dict[str, torch.Tensor] | None = getattr(model, "_kept_ranks", None)
    if masks is None:
        masks = {
            name: torch.ones_like(p) for name, p in model.base_model.model.named_parameters() if ".lora_E." in name
        }
        model._kept_ranks = masks
    return masks
