"""The result of a run: written into a folder, uploaded, and sealed by a manifest with the digest of every file.

Called by ``run.py`` at the end. ``output_uri`` gets the adapter or model, tokenizer, metrics and report;
``output_uri/merged`` the model with the adapter merged into it, where that is asked for. Doing it twice gives the
same folder: a run that was stopped here does it again.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from finetune_api.compatibility import COMPATIBILITY
from finetune_api.run import OutputInfo, TrainerConfig
from finetune_trainer.checkpoint import persistently, sha256_of
from finetune_trainer.storage import Store, digest
from finetune_trainer.telemetry import now

MANIFEST = "manifest.json"


def write_weights(
    model: Any,
    tokenizer: Any,
    weights: dict[str, Any] | None,
    config: TrainerConfig,
    directory: Path,
    unhealthy: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """The adapter or model, its tokenizer and its card into an empty directory."""
    from finetune_trainer.card import card
    from finetune_trainer.methods import METHODS

    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    METHODS[config.method.type].save(model, tokenizer, directory, weights, config)
    whole = COMPATIBILITY[config.method.type].whole_model
    (directory / "README.md").write_text(card(config, whole=whole, unhealthy=unhealthy), encoding="utf-8")


def merge(
    config: TrainerConfig,
    model_path: Path,
    adapter: Path,
    directory: Path,
    unhealthy: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """The base model, freshly loaded, with the adapter merged into it, and its card."""
    from finetune_trainer.card import card
    from finetune_trainer.methods import METHODS

    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    METHODS[config.method.type].merge(model_path, adapter, directory, config)
    (directory / "README.md").write_text(card(config, whole=True, merged=True, unhealthy=unhealthy), encoding="utf-8")


def upload(directory: Path, uri: str, kind: str, facts: dict[str, Any]) -> OutputInfo:
    """Everything in ``directory`` to ``uri``, then its manifest. ``facts`` go into the manifest as they are."""
    store = Store(uri)
    before = _files_before(store)
    persistently(lambda: store.delete(MANIFEST))
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        name = path.relative_to(directory).as_posix()
        persistently(lambda p=path, n=name: store.put(n, p))  # type: ignore[misc]
        files[name] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
    for name in sorted(before - files.keys()):  # of an earlier result in the same folder
        persistently(lambda n=name: store.delete(n))  # type: ignore[misc]
    content = json.dumps({"kind": kind, "time": now(), **facts, "files": files}, indent=1).encode()
    persistently(lambda: store.put(MANIFEST, content))
    size = sum(int(file["size"]) for file in files.values())
    return OutputInfo(uri=store.uri(), kind=kind, digest=digest(content), size=size)


def _files_before(store: Store) -> set[str]:
    """The files that the folder's manifest lists, where it has one."""
    try:
        return set(json.loads(persistently(lambda: store.get(MANIFEST)))["files"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return set()
