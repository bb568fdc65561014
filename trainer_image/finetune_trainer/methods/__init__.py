"""The fine-tuning methods: one module per family, with three functions.

``prepare(model, method, config) -> nn.Module``
    Sets what is trained, adds what the method adds, and makes gradient checkpointing work with it.
``save(model, tokenizer, directory, state_dict, config) -> None``
    Writes the result as plain peft or transformers reads it. ``state_dict`` holds the trainable weights by their
    names in ``model.named_parameters()`` where the model does not hold them itself (gathered under ZeRO-3).
``merge(model_path, adapter_dir, out_dir, config) -> None``
    Adds a saved adapter to a fresh copy of the model and writes that.

A module whose method changes the step itself has a fourth: ``hooks(model, method, max_steps) -> Hooks``.

To add a method: a file here, a row in :data:`METHODS`, and what ``finetune_api/methods.py`` says. A method of PEFT that
needs nothing but its configuration is a row in ``adapters.py``.
"""

from types import ModuleType
from typing import Any

from finetune_api.run import TrainerConfig
from finetune_trainer.hooks import NOTHING, Hooks
from finetune_trainer.methods import adalora, adapters, full, lora, prompts, selection

METHODS: dict[str, ModuleType] = {
    "full": full,
    "freeze": selection,
    "bitfit": selection,
    "lora": lora,
    "qlora": lora,  # the same adapter; model.py loads the base in 4 bits
    "adalora": adalora,
    **dict.fromkeys(prompts.CONFIGS, prompts),
    **dict.fromkeys(adapters.CONFIGS, adapters),
}


def hooks(model: Any, config: TrainerConfig, max_steps: int) -> Hooks:
    """What the method adds to the step."""
    make = getattr(METHODS[config.method.type], "hooks", None)
    found: Hooks = make(model, config.method, max_steps) if make else NOTHING
    return found
