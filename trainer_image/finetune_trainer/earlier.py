"""Adapters that were trained earlier over the model of a run: ``model.adapters``.

Those that stay as they are (stacked) are merged into the model before anything else looks at it, once per node, into
the cache: so ZeRO, 4-bit loading and merging work as ever. The last one may be trained on: then its parameters are
those of the run, and its weights the first ones. Called by ``run.py``.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from finetune_api.causes import Cause
from finetune_api.methods import Method
from finetune_api.run import ENV_CACHE, ENV_WORK, TrainerConfig
from finetune_trainer.adapter_files import WEIGHTS, described, tokenizer_folder
from finetune_trainer.fetch import Fetched
from finetune_trainer.fetching.kept import lock
from finetune_trainer.outcome import RunError
from finetune_trainer.storage import sync_folder

log = logging.getLogger(__name__)

_TYPES = {"lora": "LORA", "qlora": "LORA", "p_tuning_v2": "PREFIX_TUNING"}
"""PEFT's names of methods that it calls otherwise than we do."""
_FREE = ("loraplus_lr_ratio", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
"""Parameters that are no part of an adapter; dropout is none either."""


def trained_on(config: TrainerConfig, fetched: Fetched) -> Path | None:
    """The adapter to go on with, where there is one."""
    adapters = config.model.adapters
    return fetched.adapters[-1] if adapters and adapters[-1].train else None


def settled(config: TrainerConfig, fetched: Fetched) -> TrainerConfig:
    """The configuration with the method's parameters of the adapter to go on with.

    RunError(INVALID_CONFIGURATION) where it is of another method, or where parameters that the spec sets differ, all of
    them. What is written as the default counts as not set: a configuration does not tell the two apart.
    """
    folder = trained_on(config, fetched)
    if folder is None:
        return config
    uri, method = config.model.adapters[-1].uri, config.method
    written = described(folder, uri)
    own = written.get("finetune_method")
    kind = own["type"] if own else written.get("peft_type")
    wanted = method.type if own else _TYPES.get(method.type, method.type.upper())
    if kind != wanted:
        raise RunError(
            Cause.INVALID_CONFIGURATION,
            f"{uri} is an adapter of type {kind}, and method.type {method.type!r} goes on with {wanted} only. Name its "
            "method in spec.method.type, or remove train: true to learn a new adapter on top of it.",
        )
    if written.get("prefix_projection") and not own:
        raise RunError(
            Cause.INVALID_CONFIGURATION,
            f"{uri} was made by a network that is not in it. Train a new one, or one of method.type p_tuning_v2.",
        )
    taken, wrong = {}, []
    for name, field in type(method).model_fields.items():
        if name == "type" or name in _FREE or name.endswith("dropout") or name not in (own or written):
            continue
        theirs, mine = _read((own or written)[name], field.get_default()), getattr(method, name)
        if _same(theirs, mine):
            continue
        if mine == field.get_default():
            taken[name] = theirs
        else:
            wrong.append(f"method.{name} is {mine!r}, the adapter's {theirs!r}")
    if wrong:
        raise RunError(
            Cause.INVALID_CONFIGURATION,
            f"{uri} goes on with its own parameters: {'; '.join(wrong)}. Leave them out, or write the adapter's.",
        )
    log.info("going on with %s: %s", uri, ", ".join(f"{name} {value}" for name, value in taken.items()))
    settled_method: Any = TypeAdapter(Method).validate_python(method.model_dump() | taken)
    return config.model_copy(update={"method": settled_method})


def _read(value: Any, default: Any) -> Any:
    """A parameter as PEFT writes it, as our models have it."""
    if value is None and isinstance(default, list | dict | str):
        return type(default)()
    if value is True and isinstance(default, str):
        return "default"  # init_lora_weights
    return value


def _same(theirs: Any, mine: Any) -> bool:
    return sorted(theirs) == sorted(mine) if isinstance(theirs, list) and isinstance(mine, list) else theirs == mine


def begin_with(model: Any, config: TrainerConfig, folder: Path) -> None:
    """Put the weights of the adapter in ``folder`` into a model that the method has prepared."""
    from safetensors.torch import load_file

    from finetune_trainer.methods import parts

    if not hasattr(model, "peft_config"):
        parts.read(model, folder)
        return
    from peft import set_peft_model_state_dict

    wrong: list[str] = []
    try:
        result: Any = set_peft_model_state_dict(model, load_file(folder / WEIGHTS))
        if not model.active_peft_config.is_prompt_learning:  # those PEFT loads apart, and then tells as unexpected
            wrong = [*result.unexpected_keys, *(key for key in result.missing_keys if _of_adapter(model, key))]
    except (RuntimeError, KeyError) as error:
        wrong = [str(error).strip().splitlines()[-1].strip()]
    if wrong:
        raise RunError(
            Cause.INVALID_CONFIGURATION,
            f"{config.model.adapters[-1].uri} does not fit {config.model.uri}: {len(wrong)} of its weights have no "
            f"place there or are missing, e.g. {wrong[0]}. Name the model it was trained on.",
        )


def _of_adapter(model: Any, key: str) -> bool:
    parameters = dict(model.named_parameters())
    return key in parameters and parameters[key].requires_grad


# --- stacked --------------------------------------------------------------------------------------------------------


def stacked(config: TrainerConfig, fetched: Fetched) -> Fetched:
    """What was fetched, with the frozen adapters merged into the model: its folder in the cache."""
    frozen = [
        (source, folder)
        for source, folder in zip(config.model.adapters, fetched.adapters, strict=True)
        if not source.train
    ]
    if not frozen:
        return fetched
    from finetune_trainer.merge import Part, merged, write

    digests = sorted(f"{uri} {digest}" for uri, digest in fetched.digests.items())
    facts = json.dumps(["with its tokenizer", str(fetched.model), [str(folder) for _, folder in frozen], digests])
    home = Path(os.environ.get(ENV_CACHE) or os.environ.get(ENV_WORK) or tempfile.gettempdir())
    entry = home / "stacked" / hashlib.sha256(facts.encode()).hexdigest()[:32]
    entry.parent.mkdir(parents=True, exist_ok=True)
    with lock(entry):
        if not entry.is_dir():
            log.info("merging %d adapter(s) into the model, in %s", len(frozen), entry)
            partial = entry.with_name(f".partial-{uuid.uuid4().hex[:8]}")
            try:
                model = None
                for source, folder in frozen:
                    model = merged(fetched.model, [Part(source.uri, folder)], config.model, base=model)
                words = tokenizer_folder(fetched.model, [folder for _, folder in frozen])
                write(model, words, partial, config.max_shard_size)
                sync_folder(partial)
                partial.rename(entry)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return replace(fetched, model=entry)
