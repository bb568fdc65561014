"""A finished model, ready to be used: a whole one, or an adapter beside its base.

Called by ``evaluate.py`` and ``chat.py``.

An adapter's folder that a run has written says what its base is; the adapters that run began with are merged into it.
"""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune_api.causes import Cause
from finetune_api.methods import Lora
from finetune_api.run import TrainerConfig, UseConfig
from finetune_api.spec import Data, DataSource, Evaluation, ModelSource, Training
from finetune_api.stages import MAKERS, SequenceClassification, TokenClassification
from finetune_trainer.adapter_files import CONFIG, described, tokenizer_folder
from finetune_trainer.fetch import Fetched, fetch_model
from finetune_trainer.outcome import RunError
from finetune_trainer.world import World

NOWHERE = "file:///nowhere"


@dataclass(frozen=True)
class Found:
    """A finished model on this node."""

    config: TrainerConfig
    """Of a run that would train it; its model is the base."""
    fetched: Fetched
    """``model``: the base with all adapters but the last one in it."""
    adapter: Path | None
    """The last one; it is loaded beside the model."""
    words: Path
    """The folder whose tokenizer is used."""


def accelerator(wanted: str) -> str:
    """gpu or cpu; auto: a GPU where there is one."""
    if wanted != "auto":
        return wanted
    import torch

    return "gpu" if torch.cuda.is_available() else "cpu"


def find(use: UseConfig, cache: Path, data: list[DataSource], training: Training, max_length: int = 2048) -> Found:
    """Fetch it, and merge what is to be merged. RunError."""
    digests: dict[str, str] = {}
    source = use.model
    folder, adapters = fetch_model(source, cache, digests)
    written: dict[str, Any] = {}
    words = tokenizer_folder(folder, adapters)
    adapter = adapters.pop() if adapters else None
    if (folder / CONFIG).is_file() and not any(folder.glob("model*.safetensors")):
        if adapter is not None:
            raise RunError(
                Cause.INVALID_CONFIGURATION,
                f"{source.uri} is an adapter; adapters are put on top of a model. Name its "
                "model first, and all adapters by --adapter.",
            )
        written, adapter = _manifest(folder), folder
        source = use.base or _base(source, folder, written)
        path, adapters = fetch_model(source, cache, digests)
    else:
        written, path = _manifest(folder), folder
        source = source.model_copy(update={"adapters": source.adapters[:-1]})
    stage = use.stage or written.get("stage") or "sft"
    if stage in MAKERS:
        raise RunError(Cause.INVALID_CONFIGURATION, f"{use.model.uri} was made by stage {stage}: it is data, no model.")
    frozen = source.model_copy(update={"adapters": [a.model_copy(update={"train": False}) for a in source.adapters]})
    config = TrainerConfig(
        namespace="default",
        name="finished",
        stage=stage,
        model=frozen,
        method=Lora(type="lora"),
        data=Data(
            train=data[:1] or [DataSource(uri=NOWHERE)],
            eval=data,
            max_length=max_length,
            chat_template=use.chat_template,
            check_contamination=False,
        ),
        training=training,
        evaluation=Evaluation(),
        deepspeed={"zero_optimization": {"stage": 0}},
        checkpoint_uri=NOWHERE,
        save_steps=1,
        save_total_limit=1,
        output_uri=NOWHERE,
        global_batch_size=1,
        accelerator=accelerator(use.accelerator),
        **_labels(stage, adapter or path),
    )
    from finetune_trainer import earlier

    fetched = earlier.stacked(config, Fetched(path, [], [], adapters, digests=digests))
    # What is merged into it is no longer beside it.
    config = config.model_copy(update={"model": frozen.model_copy(update={"adapters": []})})
    return Found(config, replace(fetched, adapters=[]), adapter, words)


def _manifest(folder: Path) -> dict[str, Any]:
    """What a run has written about its result; empty where no run did."""
    try:
        found = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _base(source: ModelSource, folder: Path, written: dict[str, Any]) -> ModelSource:
    """The model below an adapter: by the run's manifest, or by what PEFT writes."""
    if isinstance(written.get("base"), dict):
        base = ModelSource.model_validate(written["base"])
        return base.model_copy(update={"adapters": [one for one in base.adapters if not one.train]})
    name = str(written.get("base_model") or described(folder, source.uri).get("base_model_name_or_path") or "")
    if "://" not in name:
        name = f"file://{name}" if name.startswith("/") else f"hf://{name}" if name else ""
    if not name:
        raise RunError(
            Cause.INVALID_CONFIGURATION,
            f"{source.uri} is an adapter, and does not say of which model. Name it by --base.",
        )
    return ModelSource(uri=name)


def _labels(stage: str, folder: Path) -> dict[str, Any]:
    """The labels of a finished classifier."""
    if stage not in ("sequence_classification", "token_classification"):
        return {}
    try:
        config = json.loads((folder / "config.json").read_text())
        names = [str(config["id2label"][str(place)]) for place in range(len(config["id2label"]))]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            Cause.INVALID_CONFIGURATION, f"{folder} names no labels in its config.json (id2label): it is no classifier."
        ) from error
    if stage == "token_classification":
        return {stage: TokenClassification(labels=names)}
    kind = config.get("problem_type") or "auto"
    return {stage: SequenceClassification(labels=[] if kind == "regression" else names, problem_type=kind)}


Off = Callable[[], AbstractContextManager[Any]]


def precision(model: Any) -> AbstractContextManager[Any]:
    """What the model is called in: bf16 where fp32 adapters stand in a bf16 model, as in training."""
    import torch

    kinds = {parameter.dtype for parameter in model.parameters()}
    mixed = {torch.bfloat16, torch.float32} <= kinds
    return torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=mixed)


def load(found: Found, world: World) -> tuple[Any, Off | None]:
    """The model on the world's device, and what switches its adapter off."""
    from finetune_trainer import model as loading

    base = loading.load_finished(found.fetched.model, found.config, world.device, found.adapter or found.fetched.model)
    if found.adapter is None:
        return base, None
    return put_on(base, found.adapter, str(found.config.model.uri))


def put_on(base: Any, adapter: Path, uri: str) -> tuple[Any, Off]:
    """The model with an adapter beside it, and what switches that off. RunError where it does not fit."""
    if "finetune_method" in described(adapter, str(adapter)):
        from finetune_trainer.methods import load_adapter, parts

        model = load_adapter(base, adapter)
        return model.eval(), lambda: parts.switched_off(model)
    from finetune_trainer.methods.adapters import put_beside

    try:
        tuned: Any = put_beside(base, adapter, str(adapter))
    except (RuntimeError, ValueError, KeyError) as error:
        line = str(error).strip().splitlines()[-1].strip() if str(error).strip() else type(error).__name__
        raise RunError(
            Cause.INVALID_CONFIGURATION, f"the adapter does not fit {uri}: {line}. Name the model it was trained on."
        ) from error
    return tuned.eval(), tuned.disable_adapter
