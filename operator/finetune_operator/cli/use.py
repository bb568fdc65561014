"""``finetune evaluate`` and ``finetune chat``: hand a finished model to a process of the trainer.

Called by ``main.py``. A model is a URI, a path of this machine, or ``job://NAME``, the output of a run of this machine.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from finetune_api.conditions import State
from finetune_api.run import ENV_CACHE, ENV_LOCAL, ChatConfig, EvaluateConfig, UseConfig
from finetune_api.status import FineTuneJobStatus
from finetune_operator.cli.files import RefusedError
from finetune_operator.cli.merge import uri, with_gguf_file
from finetune_operator.cluster.local import default_cache
from finetune_operator.cluster.store import Folder

Config = TypeVar("Config", bound=UseConfig)
KINDS = ("adapter", "model", "merged")
"""Of a run's outputs the one that is used: an adapter can be compared with its base."""


def configuration(
    made: type[Config],
    model: str,
    adapters: Sequence[str],
    base: str,
    revision: str,
    gguf_file: str,
    state: tuple[Path, str],
    **options: Any,
) -> Config:
    """The trainer's configuration. RefusedError with everything that is not accepted. ``state``: the folder of this
    machine's runs, and the namespace."""
    problems: list[str] = []

    def known(text: str, kinds: Sequence[str] = KINDS) -> str:
        try:
            return _known(text, kinds, *state)
        except RefusedError as refused:
            problems.extend(refused.mistakes)
            return "file:///nowhere"

    base, gguf_file = with_gguf_file(base, gguf_file)
    model, gguf_file = with_gguf_file(model, gguf_file)
    source = {"uri": known(model), "adapters": [{"uri": known(one, ("adapter",))} for one in adapters]}
    below = {"uri": known(base, ("merged", "model"))} if base else None
    # A branch, and a file of a GGUF repository, are the base's where there is one.
    target = below if below is not None else source
    target |= ({"revision": revision} if revision else {}) | ({"gguf_file": gguf_file} if gguf_file else {})
    if "data" in options:
        options["data"] = [one | {"uri": known(one["uri"], ("data",))} for one in options["data"]]
    try:
        config = made.model_validate({"model": source, "base": below, **options})
    except ValidationError as error:
        problems += [
            f"{'.'.join(map(str, e['loc']))}: {e['input']!r} is not accepted: {e['msg']}." for e in error.errors()
        ]
    if problems:
        raise RefusedError(problems)
    return config


def _known(text: str, kinds: Sequence[str], state_dir: Path, namespace: str) -> str:
    """The URI of what was named."""
    if text.startswith("pvc://"):
        raise RefusedError([f"{text}: a cluster's claims are not seen from here. Copy the folder, and name its path."])
    if not text.startswith("job://"):
        found = uri(text)
        if found.startswith("file://") and "://" not in text and not Path(text).exists():
            raise RefusedError([f"{text}: there is no such file or folder; a model of the hub is hf://ORG/NAME."])
        return found
    name = text.removeprefix("job://")
    job = Folder(state_dir / namespace / name).job
    status = FineTuneJobStatus.model_validate((job or {}).get("status") or {})
    if status.state != State.SUCCEEDED:
        what = f"it is {status.state}" if status.state else "it was not run on this machine"
        raise RefusedError(
            [
                f"{text}: {what} ({state_dir}/{namespace}). Of a job on a cluster name its output: "
                f"kubectl get ftj {name} -o jsonpath='{{.status.outputs}}'"
            ]
        )
    written = {output.kind: output.uri for output in status.outputs}
    output = next((written[kind] for kind in kinds if kind in written), None)
    if output is None:
        raise RefusedError([f"{text} wrote {', '.join(written) or 'nothing'}; accepted here: {' or '.join(kinds)}."])
    return output


def run(config: EvaluateConfig | ChatConfig) -> int:
    """The exit code of the trainer's process, which has this one's terminal."""
    module = "evaluate" if isinstance(config, EvaluateConfig) else "chat"
    cache = default_cache()
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="finetune-") as folder:
        path = Path(folder) / "config.json"
        path.write_text(config.model_dump_json())
        environment = os.environ | {
            ENV_CACHE: str(cache),
            ENV_LOCAL: "true",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        process = subprocess.Popen([sys.executable, "-m", f"finetune_trainer.{module}", str(path)], env=environment)
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:  # the process has it too, and decides
                continue
