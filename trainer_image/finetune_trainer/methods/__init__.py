"""The fine-tuning methods: one module each, with three functions.

``prepare(model, method, config) -> nn.Module``
    Sets what is trained, adds what the method adds, and makes gradient checkpointing work with it.
``save(model, tokenizer, directory, state_dict, config) -> None``
    Writes the result as plain peft or transformers reads it. ``state_dict`` holds the trainable weights by their
    names in ``model.named_parameters()`` where the model does not hold them itself (gathered under ZeRO-3).
``merge(model_path, adapter_dir, out_dir, config) -> None``
    Adds a saved adapter to a fresh copy of the model and writes that.

Two functions more, where they apply: ``inject(model, method)`` attaches what :func:`load_adapter` then fills (methods
that plain peft does not read), and ``figures(model) -> dict[str, float]`` gives what a line of metrics.jsonl tells of
the method (collective).

To add a method: a file here, a row in :data:`METHODS`, and what ``finetune_api/methods.py`` says.
"""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import TypeAdapter

from finetune_api.methods import Method
from finetune_trainer.methods import bottleneck, full, lora, mam, moelora, parts, unipelt

METHODS: dict[str, ModuleType] = {
    "full": full,
    "lora": lora,
    "qlora": lora,  # the same adapter; model.py loads the base in 4 bits
    "adapter": bottleneck,
    "mam": mam,
    "unipelt": unipelt,
    "moelora": moelora,
}


def load_adapter(model: Any, directory: str | Path) -> Any:
    """The transformers model with an ``adapter``, ``mam`` or ``unipelt`` that a run has written to ``directory``.

    >>> model = AutoModelForCausalLM.from_pretrained(base)
    >>> load_adapter(model, "output").generate(...)

    RunError(INVALID_CONFIGURATION) where it belongs to another model.
    """
    described = json.loads((Path(directory) / parts.CONFIG).read_text())
    method: Any = TypeAdapter(Method).validate_python(described["finetune_method"])
    METHODS[method.type].inject(model, method)
    parts.read(model, Path(directory))
    return model
