"""Brings model and data to this node before anything heavy is imported.

``python -m finetune_trainer.fetch`` is the pods' init container; ``run.py`` calls :func:`fetch` again in the
trainer's container, which then finds everything in the cache and asks nobody. Imports neither torch nor
transformers: it starts in a third of a second.

What lies under ``file://`` is used where it is. Everything else is kept in the cache, a folder that many pods
may share: one folder per source, in it one per version of its content, and a record with the size and digest of
every file (``fetching/kept.py``).
"""

import hashlib
import json
import logging
import os
import shutil
import sys
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from finetune_api.causes import Cause
from finetune_api.run import ENV_CACHE, ENV_CONFIG, Termination, TrainerConfig
from finetune_api.spec import AdapterSource, DataSource, ModelSource
from finetune_trainer.faults import diagnose, exit_code, leave_word
from finetune_trainer.fetching.hub import fetch_hub, parse_hub
from finetune_trainer.fetching.kept import (
    Record,
    cache_broken,
    digest_all,
    lock,
    read_record,
    unchanged,
    write_atomically,
    write_record,
)
from finetune_trainer.fetching.wanted import (
    DATA_KINDS,
    Select,
    adapter_files,
    data_kind,
    local_files,
    model_files,
    reward_files,
    row_files,
    some,
    split_pattern,
    tokenizer_files,
)
from finetune_trainer.outcome import RunError
from finetune_trainer.storage import Entry, Store, file_digest, local_path

log = logging.getLogger(__name__)

_LARGE = 8 * 2**20  # weight files in place above this size are sampled instead of read whole for their digest


@dataclass(frozen=True)
class Fetched:
    """Where things lie on this node."""

    model: Path
    """Folder of the model."""
    train: list[Path]
    """One file or folder per entry of ``data.train``, in its order."""
    eval: list[Path]
    """The same for ``data.eval``."""
    adapters: list[Path] = field(default_factory=list)
    """One folder per entry of ``model.adapters``, in its order."""
    judge: Path | None = None
    """Folder of the model that judges, where one is loaded for it."""
    reward_model: Path | None = None
    """Folder of the reward model, where the stage has one."""
    reward_funcs: list[Path | None] = field(default_factory=list)
    """One file per entry of ``reward_funcs``, in its order; None where it is no file."""
    digests: dict[str, str] = field(default_factory=dict)
    """What was fetched, by URI (with @revision for the hub): equal digests, equal content.
    ``git:<commit>`` for the hub, ``sha256:<hex>`` over all files otherwise, and ``sampled:<hex>`` where of large
    weight files in place only some parts were read."""


def fetch(config: TrainerConfig, cache: Path, *, refresh: bool = False) -> Fetched:
    """Model and data on this node; what is cached is compared by size and time of change, without network.

    ``refresh`` (the init container): ask each source whether it has changed, and check the cached files by
    digest. Where the source cannot be reached, what is cached is used. RunError: MODEL_NOT_FOUND,
    DATA_NOT_FOUND, ACCESS_DENIED, STORAGE_UNAVAILABLE, INVALID_CONFIGURATION (pickled weights only).
    """
    digests: dict[str, str] = {}
    model, adapters = fetch_model(config.model, cache, digests, refresh=refresh)
    train, held_out = _rows(config, cache, digests, refresh=refresh)
    judge = None
    if (source := judge_source(config)) is not None:
        judge, _ = fetch_model(source, cache, digests, refresh=refresh)
    reward_model, functions = _rewards(config, cache, digests, refresh)
    return Fetched(
        model=model,
        train=train,
        eval=held_out,
        adapters=adapters,
        judge=judge,
        reward_model=reward_model,
        reward_funcs=functions,
        digests=digests,
    )


def judge_source(config: TrainerConfig) -> ModelSource | None:
    """The model that judges (``rlaif.judge.uri``), in the run's number format."""
    judge = config.rlaif.judge if config.rlaif is not None else None
    if judge is None or judge.uri is None:
        return None
    return ModelSource(uri=judge.uri, revision=judge.revision, dtype=config.model.dtype)


def fetch_data(config: TrainerConfig, cache: Path, fetched: Fetched) -> Fetched:
    """The rows, beside a model that was fetched for itself."""
    digests = dict(fetched.digests)
    train, held_out = _rows(config, cache, digests)
    return replace(fetched, train=train, eval=held_out, digests=digests)


def _rows(
    config: TrainerConfig, cache: Path, digests: dict[str, str], *, refresh: bool = False
) -> tuple[list[Path], list[Path]]:
    """One file or folder per source of rows: those of training, and the held-out ones."""
    found = [
        [_source(source, row_files(source), Cause.DATA_NOT_FOUND, cache, refresh, digests) for source in sources]
        for sources in (config.data.train, config.data.eval)
    ]
    return found[0], found[1]


def _rewards(
    config: TrainerConfig, cache: Path, digests: dict[str, str], refresh: bool
) -> tuple[Path | None, list[Path | None]]:
    """The reward model's folder, and the files of the reward functions."""
    options = config.rollout
    if options is None:
        return None, []
    folder = None
    if (model := options.reward_model) is not None:
        source = AdapterSource(uri=model.uri, revision=model.revision)
        folder = _source(source, reward_files(source), Cause.MODEL_NOT_FOUND, cache, refresh, digests)
    functions = [
        _source(DataSource(uri=f.uri), None, Cause.DATA_NOT_FOUND, cache, refresh, digests) if f.uri else None
        for f in options.reward_funcs
    ]
    return folder, functions


def fetch_model(
    model: ModelSource, cache: Path, digests: dict[str, str], *, refresh: bool = False
) -> tuple[Path, list[Path]]:
    """A model's folder on this node, and those of its adapters; their digests are added to ``digests``."""
    folder = _source(model, model_files(model), Cause.MODEL_NOT_FOUND, cache, refresh, digests)
    adapters = [
        _source(adapter, adapter_files(adapter), Cause.MODEL_NOT_FOUND, cache, refresh, digests)
        for adapter in model.adapters
    ]
    return folder, adapters


def fetch_to_look_at(config: TrainerConfig, cache: Path) -> Fetched:
    """The data, and of model and adapters only what makes tokens: no weights (but a GGUF file is one piece)."""
    digests: dict[str, str] = {}
    if config.model.gguf_file:
        model = _source(config.model, model_files(config.model), Cause.MODEL_NOT_FOUND, cache, False, digests)
    else:
        model = _source(config.model, tokenizer_files, Cause.MODEL_NOT_FOUND, cache, False, digests, "tokenizer")
    adapters = [
        _source(adapter, tokenizer_files, Cause.MODEL_NOT_FOUND, cache, False, digests, "tokenizer")
        for adapter in config.model.adapters
    ]
    train, held_out = _rows(config, cache, digests)
    return Fetched(model=model, train=train, eval=held_out, adapters=adapters, digests=digests)


def main() -> int:
    """The init container: everything comes from the environment; the exit code is what failed means."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    start = time.monotonic()
    try:
        fetched = fetch(configuration(), Path(os.environ[ENV_CACHE]), refresh=True)
    except Exception as error:
        cause, message = diagnose(error, phase="fetching model and data")
        log.error("%s: %s", cause, message)
        log.debug("traceback", exc_info=True)
        leave_word(Termination(cause=cause, message=message[:2000], exit_code=exit_code(cause)))
        return exit_code(cause)
    for uri, found in fetched.digests.items():
        log.info("%s is %s", uri, found)
    log.info("fetched in %.1f s", time.monotonic() - start)
    return 0


def configuration() -> TrainerConfig:
    """The run's configuration. RunError where the environment names none that can be read."""
    path = os.environ.get(ENV_CONFIG, "")
    try:
        return TrainerConfig.model_validate_json(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise RunError(
            Cause.INVALID_CONFIGURATION,
            f"${ENV_CONFIG} must name the run's configuration, a JSON file. It is {path or 'not set'}: {error}",
        ) from error


# --- one source -------------------------------------------------------------------------------------------------


def _source(
    source: ModelSource | AdapterSource | DataSource,
    select: Select | None,
    missing: Cause,
    cache: Path,
    refresh: bool,
    digests: dict[str, str],
    *part: str,
) -> Path:
    """The folder or file of one source on this node; its digest is added to ``digests``.

    ``select`` picks the files of a folder; None where only a single file is accepted.
    """
    uri = source.uri
    if uri.startswith("file://"):
        return _in_place(uri, missing, digests, cache, sample=not isinstance(source, DataSource))
    name = source_key(source)
    # Other choices among the files of one source are another entry of the cache.
    choice = json.dumps([name, getattr(source, "gguf_file", ""), getattr(source, "trust_remote_code", False), *part])
    home = cache / hashlib.sha256(choice.encode()).hexdigest()[:32]
    rows = isinstance(source, DataSource)
    record = read_record(home)
    if record is None or refresh or not _understood(record, rows) or not unchanged(record, thorough=False):
        try:
            home.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cache_broken(cache, error) from error
        with lock(home):
            record = _renew(uri, source.revision, select, missing, cache, home)
    digests[name] = record.digest
    folder = Path(record.folder)
    if not rows:
        return folder
    if uri.startswith("hf://"):  # lies there as in its repository
        return folder / parse_hub(uri)[2]
    return folder / (record.only or split_pattern(uri)[1])


def _renew(uri: str, revision: str, select: Select | None, missing: Cause, cache: Path, home: Path) -> Record:
    """Make the cache agree with the source. Called under the source's lock."""
    cached = read_record(home)
    if cached is not None and not unchanged(cached, thorough=True):
        log.warning("%s in the cache is damaged; it is fetched again", uri)
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True, exist_ok=True)
        cached = None
    try:
        if uri.startswith("hf://"):
            record = fetch_hub(uri, revision, select, missing, cache, cached)
        else:
            record = _fetch_store(uri, select, missing, home, cached)
    except RunError as error:
        known = cached is not None and _understood(cached, missing is Cause.DATA_NOT_FOUND)
        if error.cause is Cause.STORAGE_UNAVAILABLE and cached is not None and known:
            log.warning("%s; going on with the cached %s", error.message, cached.digest)
            return cached
        raise
    except OSError as error:
        raise cache_broken(cache, error) from error
    write_record(home, record)
    return record


def _understood(record: Record, rows: bool) -> bool:
    """Earlier versions did not tell a folder that is named like a file from that file."""
    return record.only is not None or not rows or record.uri.startswith("hf://")


def source_key(source: ModelSource | AdapterSource | DataSource) -> str:
    """How ``Fetched.digests`` names a source."""
    return f"{source.uri}@{source.revision}" if source.uri.startswith("hf://") else source.uri


def _in_place(uri: str, missing: Cause, digests: dict[str, str], cache: Path, *, sample: bool) -> Path:
    path = local_path(uri)
    pattern = "" if sample or path.exists() else split_pattern(str(path))[1]
    try:
        if pattern:
            files, root = local_files(path), Path(split_pattern(str(path))[0])
        elif path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file() and not hidden(file, path))
            root = path
        else:
            files, root = [path], path.parent
        lines, sampled = [], False
        for file in files:
            part, whole = _content_digest(file, cache, sample)
            sampled |= not whole
            lines.append(f"{part} {file.relative_to(root)}")
    except FileNotFoundError as error:
        raise RunError(
            missing,
            f"{uri} does not exist: {path} is not there on this node. Correct the URI, or mount what it names.",
        ) from error
    except PermissionError as error:
        raise RunError(
            Cause.ACCESS_DENIED,
            f"{uri} cannot be read by user id {os.getuid()}: {error.strerror}. Change the file's permissions or set "
            "spec.workers.template.spec.securityContext (fsGroup, runAsUser).",
        ) from error
    except OSError as error:
        raise RunError(Cause.STORAGE_UNAVAILABLE, f"{uri} cannot be read: {error}. Check the mount.") from error
    if pattern and not files:
        raise RunError(missing, f"{uri}: no data file in {root} has such a name ({', '.join(DATA_KINDS)})")
    if path.is_dir() and not files:
        raise RunError(missing, f"{uri} is an empty folder")
    digests[uri] = ("sampled:" if sampled else "sha256:") + hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return path


def hidden(file: Path, root: Path) -> bool:
    """Caches of tools and Kubernetes' ..data links are no content."""
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def _content_digest(file: Path, cache: Path, sample: bool) -> tuple[str, bool]:
    """A digest of a file and whether it covers all of it.

    Hashing a model of 140 GB at every start takes minutes, so of large weights only some parts are read. Data is read
    whole, once per node: the cache remembers the digest of a large file by its place, size and time of change.
    """
    stat = file.stat()
    if stat.st_size <= _LARGE:
        return file_digest(file), True
    if not sample:
        facts = f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}"
        known = cache / "digests" / hashlib.sha256(facts.encode()).hexdigest()[:32]
        with suppress(OSError):
            return known.read_text(), True
        found = file_digest(file)
        with suppress(OSError):  # it saves time only
            known.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(known, found)
        return found, True
    with file.open("rb") as stream:
        head = stream.read(2**20)  # a safetensors header names and places every tensor
        stream.seek(stat.st_size // 2)
        middle = stream.read(2**16)
        stream.seek(stat.st_size - 2**20)
        tail = stream.read()
    return hashlib.sha256(b"%d" % stat.st_size + head + middle + tail).hexdigest(), False


# --- object storage ---------------------------------------------------------------------------------------------


def _listed(uri: str) -> tuple[Store, dict[str, Entry], str]:
    """What a URI of rows names: its folder, what lies in it, and the name of the one file, "" where it is a folder.

    The listing decides, never the ending of a name: Spark and ``datasets`` write folders that are named like files.
    Where both are there, a slash at the end means the folder.
    """
    root, pattern = split_pattern(uri)
    folder = Store(root)
    entries = {entry.path: entry for entry in folder.list()}
    parent, _, name = root.rpartition("/")
    if pattern or root.endswith("/") or parent.endswith("/"):  # or a whole bucket
        return folder, entries, ""
    beside = Store(parent)
    try:
        file = beside.find(name)
    except RunError:  # who may read the folder may be forbidden to look beside it
        if not entries:
            raise
        file = None
    if file is None or (entries and not file.size):  # a marker, as some tools make them
        return folder, entries, ""
    if entries:
        log.warning("%s is a file and a folder: the file is read; a slash at its end would mean the folder", uri)
    return beside, {name: file}, name


def _chosen(
    uri: str, select: Select | None, missing: Cause, store: Store, entries: dict[str, Entry], only: str
) -> list[str]:
    """The names of the files to fetch. RunError where there are none."""
    if not entries:
        raise RunError(missing, f"{uri} does not exist, or the folder is empty. Correct the URI.")
    if select is None:
        if not only:
            raise RunError(missing, f"{uri} is a folder with {some(entries)}. Name one file in it.")
        return [only]
    if not only:
        return select({path: entry.size for path, entry in entries.items()}, store.get)
    if not data_kind(only):
        raise RunError(missing, f"{uri} is no data file; accepted: names that end in {', '.join(DATA_KINDS)}.")
    return [only]


def _fetch_store(uri: str, select: Select | None, missing: Cause, home: Path, cached: Record | None) -> Record:
    """Download a folder, or one file, of an object store into ``home/<version>``."""
    try:
        if missing is Cause.DATA_NOT_FOUND:
            store, entries, only = _listed(uri)
        else:  # a model or an adapter: a folder, whose name is never a pattern
            store, only = Store(uri), ""
            entries = {entry.path: entry for entry in store.list()}
    except FileNotFoundError:  # no such bucket
        store, entries, only = Store(uri), {}, ""
    wanted = _chosen(uri, select, missing, store, entries, only)
    listing = json.dumps([[name, entries[name].size, entries[name].version] for name in wanted])
    target = home / hashlib.sha256(listing.encode()).hexdigest()[:16]
    if cached is not None and cached.folder == str(target):
        return replace(cached, only=only)
    total = sum(entries[name].size for name in wanted)
    log.info("fetching %d files, %.1f MB, from %s", len(wanted), total / 1e6, uri)
    partial = home / f".partial-{uuid.uuid4().hex[:8]}"
    try:
        files: dict[str, list[Any]] = {}
        for name in wanted:
            file = partial / name
            file.parent.mkdir(parents=True, exist_ok=True)
            store.download(name, file)
            files[name] = [file.stat().st_size, 0, ""]
        for name, found in zip(files, digest_all(partial / name for name in files), strict=True):
            files[name][2] = found
        try:
            partial.rename(target)
        except OSError:  # it is there: from a fetcher that died before its record, or one that had no lock
            if not unchanged(Record(uri, str(target), "", files, only), thorough=True):
                shutil.rmtree(target, ignore_errors=True)
                partial.rename(target)
        for name, entry in files.items():
            entry[1] = (target / name).stat().st_mtime_ns
    except FileNotFoundError as error:
        raise RunError(
            Cause.STORAGE_UNAVAILABLE, f"{uri} changed while it was fetched: {error}. It is tried again."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    lines = "\n".join(f"{files[name][2]} {name}" for name in sorted(files))
    return Record(uri, str(target), "sha256:" + hashlib.sha256(lines.encode()).hexdigest(), files, only)


if __name__ == "__main__":
    sys.exit(main())
