"""``finetune data preview``: the trainer's own preparation, in a process of its own (the operator never imports it).

Called by ``main.py``.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import yaml

from finetune_api.kubeyaml import Dumper
from finetune_api.run import ENV_CACHE, ENV_CONFIG, ENV_LOCAL
from finetune_operator.cli.files import Document, RefusedError
from finetune_operator.cluster.local import default_cache
from finetune_operator.manifests import GROUP, KIND, VERSION
from finetune_operator.plan import Owner, trainer_config


def job_for(path: str, model: str, stage: str) -> str:
    """A job, as YAML, that would train ``model`` on the rows of a file. Raises RefusedError without a model."""
    if not model:
        raise RefusedError(
            [f"{path} is no job (.yaml): to look at a file of rows, name a model whose tokenizer is used, by --model."]
        )
    if "://" not in model:
        model = f"file://{Path(model).resolve()}"
    job = {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": KIND,
        "metadata": {"name": "preview"},
        "spec": {
            "stage": stage,
            "model": {"uri": model},
            "data": {"train": [{"uri": path if "://" in path else f"file://{Path(path).resolve()}"}]},
            "output": {"uri": "file:///nowhere"},
            "workers": {"gpusPerWorker": 0},
        },
    }
    return yaml.dump(job, Dumper=Dumper)


def preview(document: Document, documents: Sequence[Document], rows: int, color: bool) -> int:
    """Print what a job would learn; the exit code of the trainer's module."""
    namespace, name = document.key
    uri = document.spec.model.uri
    inputs = {uri: _base(uri, document, documents)}
    config = trainer_config(Owner(namespace, name, "", {}), document.spec, inputs)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(config.model_dump_json())
        cache = default_cache()
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "finetune_trainer.data.preview", f"--rows={rows}", *(["--color"] * color)]
        environment = {**os.environ, ENV_CONFIG: str(path), ENV_CACHE: str(cache), ENV_LOCAL: "true"}
        return subprocess.run(command, env=environment, check=False).returncode


def _base(uri: str, document: Document, documents: Sequence[Document]) -> str:
    """The model that a chain of jobs began with: its tokenizer is theirs."""
    seen = {document.key}
    while uri.startswith("job://"):
        key = (document.key[0], uri.removeprefix("job://"))
        found = next((other for other in documents if other.key == key and key not in seen), None)
        if found is None:
            raise RefusedError(
                [
                    f"{document.source}: {document.key[1]}: spec.model.uri names {uri}, whose output is not looked for "
                    "here; add that job's file, or --set model.uri= the model that it starts from."
                ]
            )
        seen.add(key)
        uri = found.spec.model.uri
    return uri
