"""The README.md of a result: what it is, what it was made of, and how it is loaded. Called by ``export.py``."""

import json
from typing import Any

from finetune_api.methods import MoeLora
from finetune_api.run import TrainerConfig
from finetune_trainer.methods.adapters import base_name
from finetune_trainer.model import kind_of

OURS = ("adapter", "mam", "unipelt")
"""Methods whose adapters plain peft cannot read."""


def card(config: TrainerConfig, *, whole: bool) -> str:
    """Markdown with the head that the Hugging Face hub reads. ``whole``: it is a model, not an adapter."""
    method, base = config.method, base_name(config)
    head: dict[str, Any] = {"library_name": "transformers" if whole or method.type in OURS else "peft"}
    if config.model.uri.startswith("hf://"):
        head["base_model"] = base
    head["tags"] = ["finetune-operator", method.type, config.stage]
    parameters = method.model_dump(mode="json", exclude_defaults=True, exclude={"type"})
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in head.items()), "---", "", f"# {config.name}", ""]
    lines += [
        f"Made by [finetune-operator](report.html): `{method.type}`"
        + (f" with {json.dumps(parameters)}" if parameters else "")
        + f", stage {config.stage}, over `{base}`.",
        "",
    ]
    frozen = [adapter.uri for adapter in config.model.adapters if not adapter.train]
    if frozen and not whole:
        lines += [
            f"The base is not `{base}` alone: these adapters were merged into it first, and must be before this one is "
            f"loaded (`finetune merge`, or PEFT's `merge_and_unload`): {', '.join(f'`{uri}`' for uri in frozen)}.",
            "",
        ]
    lines += ["## Load it", "", "```python", *_loading(config, base, whole=whole), "```", "", "## Made of", ""]
    lines += [f"- rows: `{source.uri}`" for source in config.data.train]
    lines += [f"- adapter before: `{adapter.uri}`" for adapter in config.model.adapters]
    return "\n".join(lines) + "\n"


def _loading(config: TrainerConfig, base: str, *, whole: bool) -> list[str]:
    kind = kind_of(config.stage)
    if whole:
        return [f"from transformers import {kind.auto}", "", f'model = {kind.auto}.from_pretrained(".")']
    load = f'{kind.auto}.from_pretrained("{base}")'
    names = kind.auto
    if kind.new_head:  # the folder knows the labels
        load, names = (
            f'{kind.auto}.from_pretrained("{base}", config=AutoConfig.from_pretrained("."))',
            f"AutoConfig, {names}",
        )
    if config.method.type in OURS:
        return [
            "# Plain peft cannot read this adapter: its parts are those of finetune-operator.",
            "from finetune_trainer.methods import load_adapter",
            f"from transformers import {names}",
            "",
            f'model = load_adapter({load}, ".")',
        ]
    folder = f"./{config.method.tasks[0]}" if isinstance(config.method, MoeLora) else "."
    return [
        "from peft import PeftModel",
        f"from transformers import {names}",
        "",
        f'model = PeftModel.from_pretrained({load}, "{folder}")',
    ]
