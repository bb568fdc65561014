"""Brings model and data to this node before anything heavy is imported.

``python -m finetune_trainer.fetch`` is the pods' init container; ``run.py`` calls :func:`fetch` again in the
trainer's container, which then finds everything in the cache and asks nobody. Imports neither torch nor
transformers: it starts in a third of a second.

What lies under ``file://`` is used where it is. Everything else is kept in the cache, a folder that many pods
may share: one folder per source, in it one per version of its content, and a record with the size and digest of
every file. A record is written last, so a version without a record does not exist.
"""

import fnmatch
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from finetune_api.causes import Cause
from finetune_api.run import ENV_CACHE, ENV_CONFIG, Termination, TrainerConfig
from finetune_api.spec import AdapterSource, DataSource, ModelSource
from finetune_trainer.adapter_files import CONFIG, WEIGHTS
from finetune_trainer.faults import diagnose, exit_code, leave_word
from finetune_trainer.outcome import RunError
from finetune_trainer.storage import Store, file_digest, local_path

log = logging.getLogger(__name__)

DATA_KINDS = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow")
_PACKED = (".gz", ".bz2", ".xz", ".zst")
_COLUMNS = (".parquet", ".arrow")  # compressed inside
_NO_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # what datasets writes beside
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
_MODEL_PARTS = (
    "*.json",  # configuration, tokenizer, index of the shards
    "*.jinja",  # chat template
    "*.model",  # sentencepiece
    "*.tiktoken",
    "vocab.txt",
    "merges.txt",
    "special_tokens_map*",
)
_LARGE = 8 * 2**20  # weight files in place above this size are sampled instead of read whole for their digest
_HUB_TRIES = 4


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


@dataclass(frozen=True)
class _Record:
    """A version of a source in the cache. ``files`` maps names to [size, mtime_ns, sha256 or ""]."""

    uri: str
    folder: str
    digest: str
    files: dict[str, list[Any]]


def fetch(config: TrainerConfig, cache: Path, *, refresh: bool = False) -> Fetched:
    """Model and data on this node; what is cached is compared by size and time of change, without network.

    ``refresh`` (the init container): ask each source whether it has changed, and check the cached files by
    digest. Where the source cannot be reached, what is cached is used. RunError: MODEL_NOT_FOUND,
    DATA_NOT_FOUND, ACCESS_DENIED, STORAGE_UNAVAILABLE, INVALID_CONFIGURATION (pickled weights only).
    """
    digests: dict[str, str] = {}
    model, adapters = fetch_model(config.model, cache, digests, refresh=refresh)
    train, held_out = (
        [_source(source, _data_files(source), Cause.DATA_NOT_FOUND, cache, refresh, digests) for source in sources]
        for sources in (config.data.train, config.data.eval)
    )
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
    train, held_out = (
        [_source(source, _data_files(source), Cause.DATA_NOT_FOUND, cache, False, digests) for source in sources]
        for sources in (config.data.train, config.data.eval)
    )
    return replace(fetched, train=train, eval=held_out, digests=digests)


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
        folder = _source(source, _reward_files(source), Cause.MODEL_NOT_FOUND, cache, refresh, digests)
    functions = [
        _source(DataSource(uri=f.uri), _no_folder, Cause.DATA_NOT_FOUND, cache, refresh, digests) if f.uri else None
        for f in options.reward_funcs
    ]
    return folder, functions


def fetch_model(
    model: ModelSource, cache: Path, digests: dict[str, str], *, refresh: bool = False
) -> tuple[Path, list[Path]]:
    """A model's folder on this node, and those of its adapters; their digests are added to ``digests``."""
    folder = _source(model, _model_files(model), Cause.MODEL_NOT_FOUND, cache, refresh, digests)
    adapters = [
        _source(adapter, _adapter_files(adapter), Cause.MODEL_NOT_FOUND, cache, refresh, digests)
        for adapter in model.adapters
    ]
    return folder, adapters


def fetch_to_look_at(config: TrainerConfig, cache: Path) -> Fetched:
    """The data, and of the model only what makes tokens: no weights, no adapters (but a GGUF file is one piece)."""
    digests: dict[str, str] = {}
    if config.model.gguf_file:
        model = _source(config.model, _model_files(config.model), Cause.MODEL_NOT_FOUND, cache, False, digests)
    else:
        model = _source(config.model, _tokenizer_files, Cause.MODEL_NOT_FOUND, cache, False, digests, "tokenizer")
    train, held_out = (
        [_source(source, _data_files(source), Cause.DATA_NOT_FOUND, cache, False, digests) for source in sources]
        for sources in (config.data.train, config.data.eval)
    )
    return Fetched(model=model, train=train, eval=held_out, digests=digests)


def main() -> int:
    """The init container: everything comes from the environment; the exit code is what failed means."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    start = time.monotonic()
    try:
        fetched = fetch(_config(), Path(os.environ[ENV_CACHE]), refresh=True)
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


def _config() -> TrainerConfig:
    path = os.environ.get(ENV_CONFIG, "")
    try:
        return TrainerConfig.model_validate_json(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise RunError(
            Cause.INVALID_CONFIGURATION,
            f"${ENV_CONFIG} must name the run's configuration, a JSON file. It is {path or 'not set'}: {error}",
        ) from error


# --- which files of a source are wanted -------------------------------------------------------------------------

Names = dict[str, int]
"""File names relative to the source, with their sizes in bytes (-1 where unknown)."""
Select = Callable[[Names, Callable[[str], bytes]], list[str]]
"""Picks the wanted names; may read small files by name."""


def _model_files(model: ModelSource) -> Select:
    def select(names: Names, read: Callable[[str], bytes]) -> list[str]:
        top = [name for name in names if "/" not in name]
        patterns = (*_MODEL_PARTS, *(("*.py",) if model.trust_remote_code else ()))
        parts = [name for name in top if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
        if model.gguf_file:
            if model.gguf_file not in names:
                raise RunError(
                    Cause.MODEL_NOT_FOUND,
                    f"{model.uri} holds no file {model.gguf_file!r} (spec.model.gguf_file); its GGUF files: "
                    f"{_some(name for name in names if name.endswith('.gguf'))}",
                )
            return sorted({*parts, model.gguf_file})
        index = "model.safetensors.index.json"
        if index in names:
            weights = sorted(set(json.loads(read(index))["weight_map"].values()))
            missing = [name for name in weights if name not in names]
            if missing:
                raise RunError(
                    Cause.MODEL_NOT_FOUND,
                    f"{model.uri} is incomplete: {index} names {_some(missing)}, which are not there",
                )
        elif "model.safetensors" in names:
            weights = ["model.safetensors"]
        else:
            weights = [name for name in top if name.endswith(".safetensors")]
        if not weights:
            raise no_safetensors(model.uri, top)
        return sorted({*parts, *weights})

    return select


def _tokenizer_files(names: Names, read: Callable[[str], bytes]) -> list[str]:
    del read
    return sorted(n for n in names if "/" not in n and any(fnmatch.fnmatch(n, pattern) for pattern in _MODEL_PARTS))


def no_safetensors(uri: str, names: Iterable[str]) -> RunError:
    """The error for a model folder that holds no safetensors file. ``names``: what it holds."""
    names = list(names)
    pickled = [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in _PICKLED)]
    gguf = [name for name in names if name.endswith(".gguf")]
    if pickled:
        return RunError(
            Cause.INVALID_CONFIGURATION,
            f"{uri} holds its weights only as {_some(pickled)}. Only safetensors are accepted: the others can "
            "run code when they are read. Convert once with transformers: "
            "AutoModelForCausalLM.from_pretrained(…).save_pretrained(…), and name the result in spec.model.uri.",
        )
    if gguf:
        return RunError(
            Cause.INVALID_CONFIGURATION,
            f"{uri} holds GGUF files: name one in spec.model.gguf_file ({_some(gguf)})",
        )
    return RunError(
        Cause.MODEL_NOT_FOUND,
        f"{uri} holds no model: no *.safetensors file among {_some(names)}. "
        "spec.model.uri must name the folder that holds config.json.",
    )


def _adapter_files(adapter: AdapterSource) -> Select:
    def select(names: Names, read: Callable[[str], bytes]) -> list[str]:
        del read
        needed = [CONFIG, WEIGHTS]
        if missing := [name for name in needed if name not in names]:
            pickled = " (adapter_model.bin is not read: it can run code)" if "adapter_model.bin" in names else ""
            raise RunError(
                Cause.MODEL_NOT_FOUND,
                f"{adapter.uri} holds no adapter: {' and '.join(missing)} not among {_some(names)}{pickled}. "
                "spec.model.adapters must name folders that PEFT or a run has written.",
            )
        return [*needed, *(name for name in ("config.json",) if name in names)]  # a classifier's has its labels

    return select


def _reward_files(source: AdapterSource) -> Select:
    """Of a whole model or of an adapter, whose tokenizer and head's configuration are wanted, too."""

    def select(names: Names, read: Callable[[str], bytes]) -> list[str]:
        if CONFIG not in names:
            return _model_files(ModelSource(uri=source.uri, revision=source.revision))(names, read)
        parts = [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in _MODEL_PARTS)]
        return sorted({*_adapter_files(source)(names, read), *(name for name in parts if "/" not in name)})

    return select


def _no_folder(names: Names, read: Callable[[str], bytes]) -> list[str]:
    raise AssertionError("a reward function is a single file")


def _data_files(source: DataSource) -> Select:
    def select(names: Names, read: Callable[[str], bytes]) -> list[str]:
        del read
        _, pattern = split_pattern(source.uri)
        chosen = data_files(names, pattern)
        if source.uri.startswith("hf://"):  # says which file belongs to which split
            chosen += [name for name in names if name == "README.md"]
        if not chosen:
            raise RunError(
                Cause.DATA_NOT_FOUND,
                f"{source.uri} holds no data: no file that ends in {', '.join(DATA_KINDS)} among {_some(names)}",
            )
        return sorted(chosen)

    return select


def data_kind(name: str) -> str:
    """The ending that tells how a file is read, without that of its compression; "" where it is no data file."""
    path = PurePosixPath(name)
    packed = path.suffix in _PACKED
    ending = PurePosixPath(path.stem).suffix if packed else path.suffix
    return ending if ending in DATA_KINDS and not (packed and ending in _COLUMNS) else ""


def data_files(names: Iterable[str], pattern: str = "") -> list[str]:
    """The data files among names relative to a folder, sorted: those ``pattern`` matches, or all.

    Hidden ones are none. Of all, texts count only where there is nothing else: they tend to be licences and notes.
    """
    chosen = sorted(name for name in names if data_kind(name) and not any(p.startswith(".") for p in name.split("/")))
    if pattern:
        wanted = _glob(pattern)
        return [name for name in chosen if wanted.fullmatch(name)]
    chosen = [name for name in chosen if PurePosixPath(name).name not in _NO_ROWS]
    return [name for name in chosen if data_kind(name) != ".txt"] or chosen


def split_pattern(uri: str) -> tuple[str, str]:
    """``s3://b/rows/*.jsonl`` → (``s3://b/rows``, ``*.jsonl``); without a pattern the URI and ""."""
    parts = uri.split("/")
    first = next((number for number, part in enumerate(parts) if set(part) & set("*?[")), len(parts))
    return "/".join(parts[:first]), "/".join(parts[first:])


def _glob(pattern: str) -> re.Pattern[str]:
    """As a shell's: * and ? stop at /, ** does not, [a-z] is one of these."""
    pieces = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]/]+\])", pattern)
    meaning = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.compile(
        "".join(
            meaning.get(piece) or (piece.replace("[!", "[^") if piece.startswith("[") else re.escape(piece))
            for piece in pieces
        )
    )


def local_files(path: Path) -> list[Path]:
    """The data files that a file's, a folder's or a pattern's path means."""
    if path.is_file():
        return [path]
    root, pattern = (str(path), "") if path.is_dir() else split_pattern(str(path))
    names = (str(file.relative_to(root)) for file in Path(root).rglob("*") if file.is_file())
    return [Path(root, name) for name in data_files(names, pattern)]


# --- one source -------------------------------------------------------------------------------------------------


def _source(
    source: ModelSource | AdapterSource | DataSource,
    select: Select,
    missing: Cause,
    cache: Path,
    refresh: bool,
    digests: dict[str, str],
    *part: str,
) -> Path:
    """The folder or file of one source on this node; its digest is added to ``digests``."""
    uri = source.uri
    if uri.startswith("file://"):
        return _in_place(uri, missing, digests, cache, sample=not isinstance(source, DataSource))
    name = source_key(source)
    # Other choices among the files of one source are another entry of the cache.
    choice = json.dumps([name, getattr(source, "gguf_file", ""), getattr(source, "trust_remote_code", False), *part])
    home = cache / hashlib.sha256(choice.encode()).hexdigest()[:32]
    record = _read_record(home)
    if record is None or refresh or not _unchanged(record, thorough=False):
        try:
            home.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _cache_broken(cache, error) from error
        with lock(home):
            record = _renew(uri, source.revision, select, missing, cache, home)
    digests[name] = record.digest
    folder = Path(record.folder)
    if not isinstance(source, DataSource):
        return folder
    if _single_file(uri):
        return folder / next(iter(record.files))
    return folder / (_parse_hub(uri)[2] if uri.startswith("hf://") else split_pattern(uri)[1])


def _renew(uri: str, revision: str, select: Select, missing: Cause, cache: Path, home: Path) -> _Record:
    """Make the cache agree with the source. Called under the source's lock."""
    cached = _read_record(home)
    if cached is not None and not _unchanged(cached, thorough=True):
        log.warning("%s in the cache is damaged; it is fetched again", uri)
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True, exist_ok=True)
        cached = None
    try:
        if uri.startswith("hf://"):
            record = _fetch_hub(uri, revision, select, missing, cache, cached)
        else:
            record = _fetch_store(uri, select, missing, home, cached)
    except RunError as error:
        if error.cause is Cause.STORAGE_UNAVAILABLE and cached is not None:
            log.warning("%s; going on with the cached %s", error.message, cached.digest)
            return cached
        raise
    except OSError as error:
        raise _cache_broken(cache, error) from error
    _write_record(home, record)
    return record


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
            _write_atomically(known, found)
        return found, True
    with file.open("rb") as stream:
        head = stream.read(2**20)  # a safetensors header names and places every tensor
        stream.seek(stat.st_size // 2)
        middle = stream.read(2**16)
        stream.seek(stat.st_size - 2**20)
        tail = stream.read()
    return hashlib.sha256(b"%d" % stat.st_size + head + middle + tail).hexdigest(), False


def _single_file(uri: str) -> bool:
    return bool(data_kind(uri) or uri.endswith(".py")) and not split_pattern(uri)[1]


# --- object storage ---------------------------------------------------------------------------------------------


def _fetch_store(uri: str, select: Select, missing: Cause, home: Path, cached: _Record | None) -> _Record:
    """Download a folder, or one file, of an object store into ``home/<version>``."""
    folder_uri, _, only = uri.rpartition("/") if _single_file(uri) else (uri, "", "")
    if missing is Cause.DATA_NOT_FOUND:  # the name of a model's folder is never a pattern
        folder_uri, _ = split_pattern(folder_uri)
    store = Store(folder_uri)
    try:
        entries = {entry.path: entry for entry in store.list(only)}
    except FileNotFoundError:  # no such bucket
        entries = {}
    if not entries:
        raise RunError(missing, f"{uri} does not exist, or the folder is empty. Correct the URI.")
    names = {path: entry.size for path, entry in entries.items()}
    wanted = [only] if only else select(names, store.get)
    listing = json.dumps([[name, entries[name].size, entries[name].version] for name in wanted])
    target = home / hashlib.sha256(listing.encode()).hexdigest()[:16]
    if cached is not None and cached.folder == str(target):
        return cached
    total = sum(names[name] for name in wanted)
    log.info("fetching %d files, %.1f MB, from %s", len(wanted), total / 1e6, uri)
    partial = home / f".partial-{uuid.uuid4().hex[:8]}"
    try:
        files: dict[str, list[Any]] = {}
        for name in wanted:
            file = partial / name
            file.parent.mkdir(parents=True, exist_ok=True)
            store.download(name, file)
            files[name] = [file.stat().st_size, 0, ""]
        for name, found in zip(files, _digest_all(partial / name for name in files), strict=True):
            files[name][2] = found
        try:
            partial.rename(target)
        except OSError:  # it is there: from a fetcher that died before its record, or one that had no lock
            if not _unchanged(_Record(uri, str(target), "", files), thorough=True):
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
    return _Record(uri, str(target), "sha256:" + hashlib.sha256(lines.encode()).hexdigest(), files)


# --- the hub ----------------------------------------------------------------------------------------------------


def _fetch_hub(uri: str, revision: str, select: Select, missing: Cause, cache: Path, cached: _Record | None) -> _Record:
    """Download from the hub into its own cache (``HF_HOME``, else ``<cache>/hf``), which pods may share."""
    if not (os.environ.get("HF_HOME") or os.environ.get("HF_HUB_CACHE")):
        os.environ["HF_HOME"] = str(cache / "hf")
    # reads its environment once, when first imported
    from huggingface_hub import HfApi, constants, hf_hub_download

    repo_type, repo, inside = _parse_hub(uri)
    common: dict[str, Any] = {"repo_id": repo, "repo_type": repo_type}
    if constants.HF_HUB_OFFLINE:
        if cached is not None:
            return cached
        folder, commit, names = _offline(uri, revision, missing, common)
    else:
        info = _hub(
            lambda: HfApi().repo_info(revision=revision, files_metadata=False, **common),
            uri,
            revision,
            missing,
        )
        commit, folder = info.sha, None
        names = {sibling.rfilename: -1 for sibling in info.siblings or []}

    def one(name: str) -> Path:
        if folder is not None:
            return folder / name
        return Path(
            _hub(
                lambda: hf_hub_download(filename=name, revision=commit, **common),
                f"{uri} ({name})",
                revision,
                missing,
            )
        )

    if inside:
        wanted = [inside] if inside in names else _inside(names, inside)
        if not wanted:
            raise RunError(missing, f"{uri} (revision {revision}): no file {inside!r} there, but {_some(names)}")
    else:
        wanted = select(names, lambda name: one(name).read_bytes())
    log.info("fetching %d files of %s at commit %s", len(wanted), uri, commit)
    with ThreadPoolExecutor(4) as pool:
        paths = dict(zip(wanted, pool.map(one, wanted), strict=True))
    root = paths[wanted[0]]
    for _ in PurePosixPath(wanted[0]).parts:
        root = root.parent
    files = {name: [path.stat().st_size, 0, _blob_digest(path)] for name, path in paths.items()}
    return _Record(uri, str(root), f"git:{commit}", files)


def _inside(names: Names, inside: str) -> list[str]:
    """The data files of a folder of a repository, or those a pattern matches."""
    folder, pattern = split_pattern(inside)
    before = f"{folder}/" if folder else ""
    return [before + name for name in data_files((n[len(before) :] for n in names if n.startswith(before)), pattern)]


def _parse_hub(uri: str) -> tuple[str, str, str]:
    """``hf://datasets/ORG/NAME/FILE`` → ("dataset", "ORG/NAME", "FILE"); FILE may be missing."""
    parts = uri.removeprefix("hf://").strip("/").split("/")
    kind = "model"
    if parts[0] in ("datasets", "models"):
        kind = "dataset" if parts.pop(0) == "datasets" else "model"
    if not parts or not parts[0]:
        raise RunError(
            Cause.INVALID_CONFIGURATION,
            f"{uri!r} names no repository; accepted: hf://ORG/NAME, hf://datasets/ORG/NAME",
        )
    return kind, "/".join(parts[:2]), "/".join(parts[2:])


def _offline(uri: str, revision: str, missing: Cause, common: dict[str, Any]) -> tuple[Path, str, Names]:
    """What the hub's cache holds of a repository, without any request (HF_HUB_OFFLINE)."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    # Not snapshot_download: it insists on every file of the repository.
    home = Path(constants.HF_HUB_CACHE, repo_folder_name(**common))
    reference = home / "refs" / revision
    folder = home / "snapshots" / (reference.read_text().strip() if reference.is_file() else revision)
    if not folder.is_dir():
        raise RunError(
            missing,
            f"{uri} (revision {revision}) is not in the cache {constants.HF_HUB_CACHE}, and "
            "HF_HUB_OFFLINE forbids to fetch it. Unset HF_HUB_OFFLINE, or fill the cache.",
        )
    names = {str(file.relative_to(folder)): file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    return folder, folder.name, names


def _hub(call: Callable[[], Any], uri: str, revision: str, missing: Cause) -> Any:
    """Call the hub; network trouble is tried again, and every failure becomes a RunError that says what to do."""
    from huggingface_hub import constants, errors

    endpoint = constants.ENDPOINT
    at = f"{uri} (revision {revision}, endpoint {endpoint})"
    token = "its HF_TOKEN" if os.environ.get("HF_TOKEN") else "no HF_TOKEN is set"
    for attempt in range(1, _HUB_TRIES + 1):
        try:
            return call()
        except errors.GatedRepoError as error:
            raise RunError(
                Cause.ACCESS_DENIED,
                f"{at} is gated, and the hub does not let this run in ({token}). Accept its terms on the hub, "
                "and put a token of that account as HF_TOKEN into the Secret of spec.credentials.secretName.",
            ) from error
        except errors.RevisionNotFoundError as error:
            raise RunError(missing, f"{at}: no such revision; give a branch, tag or commit that exists") from error
        except errors.RepositoryNotFoundError as error:
            raise RunError(
                missing,
                f"{at}: no such repository, or it is private and this run may not see it ({token}). Correct the "
                "URI, or put HF_TOKEN into the Secret of spec.credentials.secretName.",
            ) from error
        except errors.RemoteEntryNotFoundError as error:
            raise RunError(missing, f"{at}: no such file") from error
        except errors.HFValidationError as error:
            raise RunError(
                Cause.INVALID_CONFIGURATION,
                f"{uri!r} is no name of a repository: {error}. Accepted: hf://ORG/NAME",
            ) from error
        except errors.HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else 0
            if status in (401, 403):
                raise RunError(
                    Cause.ACCESS_DENIED, f"{at}: the hub answers {status} ({token}). Give a valid HF_TOKEN."
                ) from error
            failure: Exception = error
        except Exception as error:  # httpx's, requests', OSError: the library changes which
            failure = error
        if attempt == _HUB_TRIES:
            raise RunError(
                Cause.STORAGE_UNAVAILABLE,
                f"{at} cannot be fetched: {_cause_line(failure)}. Tried {attempt} times. Check DNS, proxy and network "
                "policies; set HF_ENDPOINT for a mirror, or name a copy in s3://, gs://, az:// or pvc://.",
            ) from failure
        time.sleep(2 ** (attempt - 1) / 2)
    raise AssertionError("unreachable")


def _blob_digest(path: Path) -> str:
    """The hub's cache names large files by their SHA-256; others (40 digits) have no digest to compare."""
    blob = path.resolve().name
    return f"sha256:{blob}" if len(blob) == 64 else ""


# --- records and locks ------------------------------------------------------------------------------------------


def _read_record(home: Path) -> _Record | None:
    try:
        return _Record(**json.loads((home / "record.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _write_record(home: Path, record: _Record) -> None:
    _write_atomically(home / "record.json", json.dumps(asdict(record)))


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _unchanged(record: _Record, *, thorough: bool) -> bool:
    """Do the files agree with their record: by size and time of change, or by digest where ``thorough``."""
    folder = Path(record.folder)
    try:
        for name, (size, changed, _) in record.files.items():
            stat = (folder / name).stat()
            if stat.st_size != size or (not thorough and changed and stat.st_mtime_ns != changed):
                return False
        if not thorough:
            return True
        known = {name: entry[2] for name, entry in record.files.items() if entry[2]}
        # Also brings the files into the page cache, from which they are loaded next.
        return list(_digest_all(folder / name for name in known)) == list(known.values())
    except OSError:
        return False


def _digest_all(files: Iterable[Path]) -> Iterator[str]:
    with ThreadPoolExecutor(4) as pool:  # hashing releases the interpreter lock
        yield from pool.map(file_digest, files)


@contextmanager
def lock(home: Path) -> Iterator[None]:
    """One writer of a cache entry at a time, over all pods that share the cache, where its file system has locks.

    Where it has none, writers do the same work side by side: an entry appears by an atomic rename.
    """
    import fcntl

    with home.with_suffix(".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process fills %s; waiting for it", home)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            log.warning("the cache has no file locks (%s)", error)
        yield


def _cache_broken(cache: Path, error: OSError) -> RunError:
    return RunError(
        Cause.STORAGE_UNAVAILABLE,
        f"cannot write to the cache {cache}: {error}. Check its free space and permissions (the profile's cache, "
        "or the pods' ephemeral storage).",
    )


def _some(names: Iterable[str], most: int = 5) -> str:
    """``a, b, c and 4 more`` for messages."""
    names = sorted(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "nothing") + more


def _cause_line(error: BaseException) -> str:
    """The innermost explanation of a chain of exceptions, in one line."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


if __name__ == "__main__":
    sys.exit(main())
