"""A model that another job wrote as an adapter, merged into its base once per node, as ``output.merge`` would have been.

Called by ``run.py`` before anything is loaded; everything after it sees an ordinary folder.
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
import transformers

from finetune_api.causes import Cause
from finetune_api.run import TrainerConfig
from finetune_trainer.fetch import ADAPTER, Fetched
from finetune_trainer.gguf import converted, kept_once
from finetune_trainer.outcome import RunError

log = logging.getLogger(__name__)

_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}
"""By PEFT's ``task_type``."""


def whole(fetched: Fetched, config: TrainerConfig, dtype: torch.dtype) -> Path:
    """The folder of the model with all its adapters in it; of a model without adapters its own.

    RunError(INVALID_CONFIGURATION) where an adapter is no part of any weight.
    """
    if not fetched.adapters:
        return fetched.model
    facts = [str(fetched.model.resolve()), str(dtype), transformers.__version__]
    for adapter in fetched.adapters:
        described = json.loads((adapter / ADAPTER).read_text())
        if described.get("peft_type") in (None, "PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING"):
            raise RunError(
                Cause.INVALID_CONFIGURATION,
                f"{config.model.uri} was trained by a method whose result cannot be merged into the model, so no other "
                "stage can start from it. Accepted: the output of full, freeze, bitfit, or of an adapter that changes "
                "weights, such as lora.",
            )
        stat = (adapter / "adapter_model.safetensors").stat()
        facts += [str(adapter.resolve()), str(stat.st_size), str(stat.st_mtime_ns)]
    name = f"merged/{hashlib.sha256(chr(10).join(facts).encode()).hexdigest()[:32]}"
    return kept_once(name, lambda folder: _merge(fetched, dtype, folder))


def _merge(fetched: Fetched, dtype: torch.dtype, to: Path) -> None:
    from peft import PeftModel
    from transformers import AutoConfig, AutoTokenizer

    base = fetched.model
    if fetched.base is not None and fetched.base.gguf_file:
        base = converted(base, fetched.base.gguf_file, dtype)
    for number, adapter in enumerate(fetched.adapters):
        log.info("merging %s into its base", adapter)
        task = json.loads((adapter / ADAPTER).read_text()).get("task_type")
        options: dict[str, Any] = {"dtype": dtype, "local_files_only": True}
        if (adapter / "config.json").exists():  # a classifier's: it knows the labels
            options["config"] = AutoConfig.from_pretrained(adapter, local_files_only=True)
        kind = getattr(transformers, _CLASSES.get(task, "AutoModelForCausalLM"))
        model = PeftModel.from_pretrained(kind.from_pretrained(base, **options), adapter)
        model = model.merge_and_unload(safe_merge=True)
        base = to if number + 1 == len(fetched.adapters) else to / f"part-{number}"
        # Every node merges into its own cache, but transformers saves on the first process of all only.
        object.__setattr__(model, "should_save_on_this_rank", lambda *_: True)
        model.save_pretrained(base)
        AutoTokenizer.from_pretrained(adapter, local_files_only=True).save_pretrained(base)
