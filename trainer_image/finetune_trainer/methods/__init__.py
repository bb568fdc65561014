"""The fine-tuning methods: one module per family, with three functions.

``prepare(model, method, config) -> nn.Module``
    Sets what is trained, adds what the method adds, and makes gradient checkpointing work with it.
``save(model, tokenizer, directory, state_dict, config) -> None``
    Writes the result as plain peft or transformers reads it. ``state_dict`` holds the trainable weights by their
    names in ``model.named_parameters()`` where the model does not hold them itself (gathered under ZeRO-3).
``merge(model_path, adapter_dir, out_dir, config) -> None``
    Adds a saved adapter to a fresh copy of the model and writes that.

A module whose method changes the step, or tells figures of its own, has ``hooks(model, method, max_steps) ->
Hooks``. One
that plain peft does not read has ``inject(model, method)``: it attaches what :func:`load_adapter` then fills.

To add a method: a file here, a row in :data:`METHODS`, and what ``finetune_api/methods.py`` says. A method of PEFT that
needs nothing but its configuration is a row in ``adapters.py``.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import TypeAdapter

from finetune_api.compatibility import COMPATIBILITY
from finetune_api.methods import Method
from finetune_api.run import TrainerConfig
from finetune_trainer.adapter_files import described
from finetune_trainer.hooks import NOTHING, Hooks
from finetune_trainer.methods import (
    adalora,
    adapters,
    bottleneck,
    full,
    lora,
    mam,
    moelora,
    parts,
    prompts,
    selection,
    unipelt,
)

METHODS: dict[str, ModuleType] = {
    "full": full,
    "freeze": selection,
    "bitfit": selection,
    "lora": lora,
    "qlora": lora,  # the same adapter; model.py loads the base in 4 bits
    "adapter": bottleneck,
    "mam": mam,
    "unipelt": unipelt,
    "moelora": moelora,
    "adalora": adalora,
    **dict.fromkeys(prompts.CONFIGS, prompts),
    **dict.fromkeys(adapters.CONFIGS, adapters),
}


def hooks(model: Any, config: TrainerConfig, max_steps: int) -> Hooks:
    """What the method adds to the step."""
    make = getattr(METHODS[config.method.type], "hooks", None)
    found: Hooks = make(model, config.method, max_steps) if make else NOTHING
    return found


def switched_off(model: Any, config: TrainerConfig) -> Callable[[], AbstractContextManager[Any]] | None:
    """Inside what it gives, the model is the one the training started from. None: there is no such way, because its own
    weights are trained, or were changed at the start (PiSSA), or an adapter made earlier is trained on."""
    changed = getattr(model, "_first_lora", None) is not None
    changed |= getattr(config.method, "adapter_variant", "") == "houlsby"  # it trains the model's norms
    changed |= any(adapter.train for adapter in config.model.adapters)
    if COMPATIBILITY[config.method.type].whole_model or changed:
        return None
    if hasattr(model, "disable_adapter"):
        off: Callable[[], AbstractContextManager[Any]] = model.disable_adapter
        return off
    return lambda: parts.switched_off(model)


def load_adapter(model: Any, directory: str | Path) -> Any:
    """The transformers model with an ``adapter``, ``mam`` or ``unipelt`` that a run has written to ``directory``.

    >>> model = AutoModelForCausalLM.from_pretrained(base)
    >>> load_adapter(model, "output").generate(...)

    Of a classifier the folder knows the labels: ``AutoModelForSequenceClassification.from_pretrained(base,
    config=AutoConfig.from_pretrained("output"))``.

    RunError(INVALID_CONFIGURATION) where it belongs to another model.
    """
    written = described(Path(directory), str(directory))
    method: Any = TypeAdapter(Method).validate_python(written["finetune_method"])
    METHODS[method.type].inject(model, method)
    parts.train_head(model, written.get("modules_to_save", []))
    parts.read(model, Path(directory))
    return model
