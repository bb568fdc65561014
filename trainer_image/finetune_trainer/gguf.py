"""GGUF models as ordinary ones: converted once per node, into safetensors, with their tokenizer.

Called by ``model.py``. transformers reads a GGUF file slowly (its vocabulary is parsed three times, half a minute for
135M weights on a busy machine), marks the model as quantised, refuses to save it, may keep its blocks packed, and
neither bitsandbytes nor ZeRO-3 can read it. So everything after this works on the converted copy.
"""

import atexit
import hashlib
import logging
import os
import shutil
import tempfile
import uuid
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.initialization import no_init_weights

from finetune_api.run import ENV_CACHE, ENV_WORK
from finetune_trainer.fetching.kept import lock
from finetune_trainer.storage import sync_folder

log = logging.getLogger(__name__)

_scratch: list[Path] = []  # of a process without cache and work folders


def converted(folder: Path, name: str, dtype: torch.dtype) -> Path:
    """The folder of the safetensors model and tokenizer made of ``folder/name``, in ``dtype``.

    Raises what transformers raises where it cannot read the file.
    """
    stat = (folder / name).stat()
    facts = f"{(folder / name).resolve()} {stat.st_size} {stat.st_mtime_ns} {dtype} {transformers.__version__}"
    entry = _root() / "gguf" / hashlib.sha256(facts.encode()).hexdigest()[:32]
    entry.parent.mkdir(parents=True, exist_ok=True)
    with lock(entry):
        if not entry.is_dir():
            log.info("converting %s to safetensors in %s", name, entry)
            partial = entry.with_name(f".partial-{uuid.uuid4().hex[:8]}")
            try:
                _convert(folder, name, dtype, partial)
                sync_folder(partial)
                partial.rename(entry)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return entry


def dense_options() -> dict[str, Any]:
    """What ``from_pretrained`` must be told, lest the weights stay packed in blocks: such are not trained, nor merged
    into."""
    return (
        {"quantization_config": transformers.GgufConfig(dequantize=True)} if hasattr(transformers, "GgufConfig") else {}
    )


def _convert(folder: Path, name: str, dtype: torch.dtype, to: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=dtype, local_files_only=True, **dense_options()
    )
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with no_init_weights():
        model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    # Every node converts into its own cache, but transformers saves on the first process of all only.
    object.__setattr__(model, "should_save_on_this_rank", lambda *_: True)
    model.save_pretrained(to)
    AutoTokenizer.from_pretrained(folder, gguf_file=name, local_files_only=True).save_pretrained(to)


def _root() -> Path:
    given = os.environ.get(ENV_CACHE) or os.environ.get(ENV_WORK)
    if given:
        return Path(given)
    if not _scratch:
        _scratch.append(Path(tempfile.mkdtemp(prefix="finetune-")))
        atexit.register(shutil.rmtree, _scratch[0], ignore_errors=True)
    return _scratch[0]
