"""The fine-tuning methods: one module each, with three functions.

``prepare(model, method, config) -> nn.Module``
    Sets what is trained, adds what the method adds, and makes gradient checkpointing work with it.
``save(model, tokenizer, directory, state_dict, config) -> None``
    Writes the result as plain peft or transformers reads it. ``state_dict`` holds the trainable weights by their
    names in ``model.named_parameters()`` where the model does not hold them itself (gathered under ZeRO-3).
``merge(model_path, adapter_dir, out_dir, config) -> None``
    Adds a saved adapter to a fresh copy of the model and writes that.

To add a method: a file here, a row in :data:`METHODS`, and what ``finetune_api/methods.py`` says.
"""

from types import ModuleType

from finetune_trainer.methods import full, lora

METHODS: dict[str, ModuleType] = {
    "full": full,
    "lora": lora,
    "qlora": lora,  # the same adapter; model.py loads the base in 4 bits
}
