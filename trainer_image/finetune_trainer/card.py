"""The README.md of a result: what it is, what it was made of, and the lines that load it.

Called by ``export.py`` and ``merge.py``. The lines need plain transformers and peft, and are run in the result's folder
(by ``test_card.py`` for every kind of base and result).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from finetune_api.health import sentences
from finetune_api.methods import MoeLora
from finetune_api.run import MergeConfig, TrainerConfig
from finetune_api.spec import ModelSource
from finetune_trainer.methods.adapters import base_name
from finetune_trainer.model import LANGUAGE_MODEL, Kind, kind_of

OURS = ("adapter", "mam", "unipelt")
"""Methods whose adapters plain peft cannot read."""


def card(
    config: TrainerConfig, *, whole: bool, merged: bool = False, unhealthy: Mapping[str, str] = MappingProxyType({})
) -> str:
    """Markdown with the head that the Hugging Face hub reads. ``whole``: it is a model, not an adapter; ``merged``: one
    with the adapter merged into it."""
    method, kind, base = config.method, kind_of(config.stage), base_name(config.model)
    parameters = method.model_dump(mode="json", exclude_defaults=True, exclude={"type"})
    made = (
        f"Made by [finetune-operator]({'../' if merged else ''}report.html): `{method.type}`"
        + (f" with {json.dumps(parameters)}" if parameters else "")
        + f", stage {config.stage}, over `{base}`"
        + (", and merged into it." if merged else ".")
    )
    tasks = method.tasks if isinstance(method, MoeLora) else []
    place = f"./{tasks[0]}" if tasks else "."
    if whole or merged:
        code, library = _of_a_model(kind, place), "transformers"
    else:
        library = "transformers" if method.type in OURS else "peft"
        code = _of_an_adapter(config.model, kind, place, ours=method.type in OURS)
    sources = [f"rows: `{source.uri}`" for source in config.data.train]
    sources += [f"adapter before: `{adapter.uri}`" for adapter in config.model.adapters]
    doubts = [f"> **Doubtful.** {text}" for text in sentences(unhealthy)]
    head = _head(config.model, library, [method.type, config.stage])
    note = [f"Each task has a folder: {', '.join(tasks)}."] if tasks else []
    return _document(head, config.name, [*doubts, made, *note], code, sources)


def merged_card(config: MergeConfig, kind: Kind = LANGUAGE_MODEL) -> str:
    """Of what ``finetune merge`` has written."""
    parts = [
        f"`{adapter.uri}`" + (f" x {weight:g}" if weight != 1 else "")
        for adapter, weight in zip(config.model.adapters, config.weights, strict=True)
    ]
    what = "Merged into" if config.kind == "model" else "One adapter that stands for several, over"
    made = f"{what} `{base_name(config.model)}` by `finetune merge`."
    base = config.model.model_copy(update={"adapters": []})
    code = _of_a_model(kind, ".") if config.kind == "model" else _of_an_adapter(base, kind, ".")
    head = _head(config.model, "transformers" if config.kind == "model" else "peft", ["merged"])
    name = config.output_uri.rstrip("/").rpartition("/")[2]
    return _document(head, name, [made], code, [f"adapter: {part}" for part in parts])


def _head(model: ModelSource, library: str, tags: list[str]) -> dict[str, Any]:
    named = {"base_model": base_name(model)} if model.uri.startswith("hf://") else {}
    return {"library_name": library, **named, "tags": ["finetune-operator", *tags]}


def _document(head: Mapping[str, Any], name: str, words: list[str], code: list[str], sources: list[str]) -> str:
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in head.items()), "---", "", f"# {name}", ""]
    for paragraph in words:
        lines += [paragraph, ""]
    lines += ["## Load it", "", "In this folder:", "", "```python", *code, "```", "", "## Made of", ""]
    return "\n".join([*lines, *(f"- {source}" for source in sources)]) + "\n"


@dataclass(frozen=True)
class _Place:
    """Where plain libraries find something."""

    name: str
    note: str = ""
    """A line of what is to be done before."""


def _place(source: ModelSource | None, uri: str, copy: str) -> _Place:
    if uri.startswith(("hf://", "file://")):
        return _Place(base_name(source or ModelSource(uri=uri)))
    return _Place(copy, f"# {copy} is your copy of {uri}")


def _of_a_model(kind: Kind, place: str) -> list[str]:
    return [
        f"from transformers import {kind.auto}, AutoTokenizer",
        "",
        f'model = {kind.auto}.from_pretrained("{place}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{place}")',
    ]


def _of_an_adapter(model: ModelSource, kind: Kind, folder: str, *, ours: bool = False) -> list[str]:
    from finetune_trainer.gguf import dense_options

    place = _place(model, model.uri, "./base")
    names, options = ["AutoTokenizer", kind.auto], ""
    if model.uri.startswith("hf://") and model.revision not in ("", "main"):
        options += f', revision="{model.revision}"'
    if model.trust_remote_code:
        options += ", trust_remote_code=True"
    if model.gguf_file:
        options += f', gguf_file="{model.gguf_file}"'
        if dense_options():  # its weights may stay packed otherwise, and no adapter goes beside those
            options += ", quantization_config=GgufConfig(dequantize=True)"
            names.append("GgufConfig")
    if kind.new_head:  # the folder knows the labels
        options += f', config=AutoConfig.from_pretrained("{folder}")'
        names.append("AutoConfig")
    below = [adapter.uri for adapter in model.adapters if not adapter.train]
    places = [_place(None, uri, f"./adapter-{number}") for number, uri in enumerate(below, 1)]
    lines = [] if ours and not below else ["from peft import PeftModel"]
    lines.append(f"from transformers import {', '.join(sorted(names))}")
    if ours:
        lines += ["# Plain peft cannot read this adapter: its parts are those of finetune-operator."]
        lines += ["from finetune_trainer.methods import load_adapter"]
    lines += ["", *(found.note for found in (place, *places) if found.note)]
    lines.append(f'base = {kind.auto}.from_pretrained("{place.name}"{options})')
    if below:
        lines.append("# The adapter was trained over the base with these in it, in this order:")
    lines += [f'base = PeftModel.from_pretrained(base, "{found.name}").merge_and_unload()' for found in places]
    load = "load_adapter" if ours else "PeftModel.from_pretrained"
    return [*lines, f'model = {load}(base, "{folder}")', f'tokenizer = AutoTokenizer.from_pretrained("{folder}")']
