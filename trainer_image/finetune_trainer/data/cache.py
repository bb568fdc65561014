"""Tokenised sources on disk, so that they are made once for all processes of a node, all pods that share the cache
and all restarts, and lie once in a node's memory (they are mapped, not read).

Called by ``data/__init__.py``. An entry's name says everything that its content depends on.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import transformers
from transformers import PreTrainedTokenizerBase

from finetune_api.run import ENV_CACHE, ENV_WORK
from finetune_api.spec import DataSource
from finetune_trainer.data.stream import Rows
from finetune_trainer.fetching.kept import lock
from finetune_trainer.fetching.wanted import local_files
from finetune_trainer.storage import sync_folder

log = logging.getLogger(__name__)

_VERSION = 3  # raise it when formats.py or render.py make other tokens of the same row

Counts = dict[str, Any]


def cached_rows(
    source: DataSource,
    path: Path,
    digest: str,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    make: Callable[[], tuple[Rows, Counts]],
    encoding: tuple[Any, ...],
) -> tuple[Rows, Counts]:
    """What ``make`` gives, from disk where it is there already.

    ``encoding`` says what is learned of a record. ``path`` is where the rows are read from, and ``digest`` that of the
    source's content; without one, without a cache folder or with a tokenizer that cannot be told by its content,
    ``make`` is called.
    """
    key = _key(source, path, digest, tokenizer, max_length, encoding)
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


class Spool:
    """The rows of a source while they are made: in files without a name, mapped when all are there. Numbers beside
    them, and their lengths, are kept in memory."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._files: dict[str, IO[bytes]] = {}
        self._kept: list[Rows] = []

    def add(self, part: Rows) -> None:
        """The next rows."""
        if not len(part):
            return
        for key in ("ids", "learned", "labels", "notes"):
            values = getattr(part, key)
            if values is not None:
                values.tofile(self._file(key))
        # Copied: a slice, be it empty, keeps the whole array in memory.
        notes = None if part.notes is None else part.notes[:0].copy()
        kept = replace(part, ids=part.ids[:0].copy(), learned=part.learned[:0].copy(), labels=None, notes=notes)
        self._kept.append(kept)

    def rows(self) -> Rows:
        """All of them."""
        if not self._kept:
            return Rows.of(self._name, [])
        joined = Rows.joined(self._name, self._kept)
        return replace(
            joined,
            ids=self._mapped("ids", np.int32),
            learned=self._mapped("learned", np.bool_),
            labels=self._mapped("labels", np.int32) if "labels" in self._files else None,
            notes=self._mapped("notes", np.uint8) if "notes" in self._files else None,
        )

    def _file(self, key: str) -> IO[bytes]:
        if key not in self._files:
            folder = next((os.environ[name] for name in (ENV_CACHE, ENV_WORK) if _usable(os.environ.get(name))), None)
            self._files[key] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        return self._files[key]

    def _mapped(self, key: str, dtype: Any) -> np.ndarray:
        file = self._files[key]
        file.flush()
        return np.memmap(file, dtype=dtype, mode="r")


def _usable(folder: str | None) -> bool:
    return bool(folder) and Path(str(folder)).is_dir() and os.access(str(folder), os.W_OK)


def _key(
    source: DataSource,
    path: Path,
    digest: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    encoding: tuple[Any, ...],
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
        [source.uri, source.split] if source.uri.startswith("hf://") else _read(path),
        hashlib.sha256(backend.to_str().encode()).hexdigest(),
        tokenizer.chat_template,
        tokenizer.special_tokens_map,
        max_length,
        encoding,
    ]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:32]


def _read(path: Path) -> list[tuple[str, int]]:
    """Name and size of every file that is read."""
    return [(file.name, file.stat().st_size) for file in local_files(path)]


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
