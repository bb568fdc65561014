"""``finetune merge``: hands a ``MergeConfig`` to a process of the trainer, because nothing here imports torch."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finetune_api.run import ENV_LOCAL, MergeConfig
from finetune_operator.cli.files import RefusedError

_WEIGHTED = re.compile(r"(?P<uri>.+)=(?P<weight>[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?)", re.IGNORECASE)


def configuration(
    base: str, revision: str, adapters: Sequence[str], output: str, gguf_file: str = "", **options: Any
) -> MergeConfig:
    """The configuration of one merge. RefusedError where something of it is not accepted, all of it at once.

    ``adapters``: URI or URI=WEIGHT. A path without ``://`` is one of this machine.
    """
    base, gguf_file = with_gguf_file(base, gguf_file)
    sources, weights = [], []
    for adapter in adapters:
        found = _WEIGHTED.fullmatch(adapter)
        sources.append({"uri": uri(found["uri"] if found else adapter)})
        weights.append(float(found["weight"]) if found else 1.0)
    given = [uri(base), uri(output), *(source["uri"] for source in sources)]
    problems = [
        f"{one}: accepted: hf://, s3://, gs://, az://, file:// or a path; a cluster's claims and jobs are not seen."
        for one in given
        if one.startswith(("job://", "pvc://"))
    ]
    prunes = any(word in options["combination"] for word in ("ties", "dare", "prune"))
    if prunes != (options["density"] is not None):
        needed = "a share above 0 and at most 1 with a combination that prunes (ties, dare, magnitude_prune)"
        problems.append(f"--density: accepted: {needed}, and none with others.")
    if options["rank"] is not None and "svd" not in options["combination"]:
        problems.append("--rank: accepted with a combination that decomposes (svd); others keep ranks or add them.")
    if options["kind"] == "adapter" and options["modules"]:
        problems.append("--modules: accepted with --as model; an adapter is written whole.")
    document = {
        "model": {"uri": uri(base), "revision": revision, "gguf_file": gguf_file, "adapters": sources},
        "weights": weights,
        "output_uri": uri(output).rstrip("/"),
        **options,
    }
    try:
        re.compile(options["modules"])
        config = MergeConfig.model_validate(document)
    except re.error as error:
        problems.append(f"--modules {options['modules']!r} is no regular expression: {error}.")
    except ValidationError as error:
        told = {".".join(map(str, found["loc"])): found for found in error.errors()}
        problems += [f"{field}: {found['input']!r} is not accepted: {found['msg']}." for field, found in told.items()]
    if problems:
        raise RefusedError(problems)
    if config.output_uri in (config.model.uri, *(adapter.uri for adapter in config.model.adapters)):
        raise RefusedError([f"--output {output}: what is merged would be overwritten; accepted: another folder."])
    folder = Path(config.output_uri.removeprefix("file://"))
    if config.output_uri.startswith("file://") and folder.exists() and (folder.is_file() or any(folder.iterdir())):
        raise RefusedError(
            [f"--output {output}: it is not empty, and nothing is written over; accepted: a new or empty folder."]
        )
    return config


def with_gguf_file(model: str, gguf_file: str) -> tuple[str, str]:
    """The folder and the file of a model that was named by its GGUF file."""
    if gguf_file or not model.endswith(".gguf"):
        return model, gguf_file
    folder, _, name = model.rpartition("/")
    return folder or ".", name


def uri(text: str) -> str:
    """A URI as it is, a path as file:// from here."""
    if text.startswith(("file://./", "file://../")):
        text = text.removeprefix("file://")
    return text if "://" in text else f"file://{Path(text).absolute()}"


def run(config: MergeConfig) -> int:
    """The exit code of the trainer's process."""
    with tempfile.TemporaryDirectory(prefix="finetune-") as folder:
        path = Path(folder) / "merge.json"
        path.write_text(config.model_dump_json())
        command = [sys.executable, "-m", "finetune_trainer.merge", str(path)]
        # DeepSpeed, which transformers imports, would warn of the GPU that it does not find.
        variables = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "DS_ACCELERATOR": "cpu", ENV_LOCAL: "true"}
        return subprocess.call(command, env=os.environ | variables)
