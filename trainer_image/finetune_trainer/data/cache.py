"""Tokenised sources on disk, so that they are made once for all processes of a node, all pods that share the cache
and all restarts, and lie once in a node's memory (they are mapped, not read).

Called by ``data/__init__.py``. An entry's name says everything that its content depends on.
"""

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from transformers import PreTrainedTokenizerBase

from finetune_api.run import ENV_CACHE, ENV_WORK
from finetune_api.spec import DataSource
from finetune_trainer.data.stream import Rows
from finetune_trainer.fetch import lock
from finetune_trainer.storage import sync_folder

log = logging.getLogger(__name__)

_VERSION = 2  # raise it when formats.py or render.py make other tokens of the same row

Counts = dict[str, Any]


def cached_rows(
    source: DataSource,
    digest: str,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    make: Callable[[], tuple[Rows, Counts]],
    encoding: tuple[Any, ...],
) -> tuple[Rows, Counts]:
    """What ``make`` gives, from disk where it is there already.

    ``encoding`` says what is learned of a record. ``digest`` is that of the source's content; without one, without a
    cache folder or with a tokenizer that cannot be told by its content, ``make`` is called.
    """
    key = _key(source, digest, tokenizer, max_length, encoding)
    root = os.environ.get(ENV_CACHE) or os.environ.get(ENV_WORK)
    if not key or not root:
        return make()
    entry = Path(root) / "tokens" / key
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with lock(entry):
            found = _load(entry, name)
            if found is not None:
                found[1]["uri"] = source.uri
                log.info("%s: tokens found in %s", name, entry)
                return found
            rows, counts = make()
            _store(entry, rows, counts)
    except OSError as error:  # the cache saves time only
        log.warning("tokens are not cached in %s: %s", root, error)
        return make()
    return _load(entry, name) or (rows, counts)


def _key(
    source: DataSource, digest: str, tokenizer: PreTrainedTokenizerBase, max_length: int, encoding: tuple[Any, ...]
) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not digest or digest.startswith("sampled:") or backend is None:
        return ""
    parts = [
        _VERSION,
        transformers.__version__,  # renders the template
        digest,
        [source.format, source.columns, source.sample_by],
        # a commit is the digest of a whole repository, of which uri and split choose a part
        [source.uri, source.split] if source.uri.startswith("hf://") else [],
        hashlib.sha256(backend.to_str().encode()).hexdigest(),
        tokenizer.chat_template,
        tokenizer.special_tokens_map,
        max_length,
        encoding,
    ]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:32]


def _load(entry: Path, name: str) -> tuple[Rows, Counts] | None:
    try:
        counts = json.loads((entry / "counts.json").read_text())
        ids, learned, starts = (np.load(entry / f"{part}.npy", mmap_mode="r") for part in ("ids", "learned", "starts"))
        labels, notes, note_starts = (
            np.load(entry / f"{part}.npy", mmap_mode="r") if (entry / f"{part}.npy").exists() else None
            for part in ("labels", "notes", "note_starts")
        )
        numbers = {path.stem: np.load(path, mmap_mode="r") for path in sorted((entry / "numbers").glob("*.npy"))}
        parts = int(counts["parts"])
    except (OSError, ValueError, KeyError):
        return None
    if len(ids) != len(learned) or len(ids) != counts["tokens"] or int(starts[-1]) != len(ids):
        return None
    del counts["parts"]
    return Rows(name, ids, learned, starts, parts, labels, numbers, notes, note_starts), counts


def _store(entry: Path, rows: Rows, counts: Counts) -> None:
    partial = entry.with_name(f".partial-{uuid.uuid4().hex[:8]}")
    (partial / "numbers").mkdir(parents=True)
    try:
        for part in ("ids", "learned", "starts", "labels", "notes", "note_starts"):
            if getattr(rows, part) is not None:
                np.save(partial / f"{part}.npy", getattr(rows, part))
        for key, values in rows.numbers.items():
            np.save(partial / "numbers" / f"{key}.npy", values)
        (partial / "counts.json").write_text(json.dumps(counts | {"parts": rows.parts}))
        sync_folder(partial)
        shutil.rmtree(entry, ignore_errors=True)
        partial.rename(entry)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
