"""What is kept of a source in the cache of a node, which many pods may share: versions, their records, one writer.

A record is written last, so a version without a record does not exist. Called by ``fetch.py``; everything else that is
made once per node takes its :func:`lock`.
"""

import json
import logging
import os
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune_api.causes import Cause
from finetune_trainer.outcome import RunError, disk_is_full, where_it_runs
from finetune_trainer.storage import file_digest

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """A version of a source in the cache. ``files`` maps names to [size, mtime_ns, sha256 or ""]."""

    uri: str
    folder: str
    digest: str
    files: dict[str, list[Any]]
    only: str | None = None
    """The one file that the URI names; "" where it names a folder. None: written before that was told apart."""


def read_record(home: Path) -> Record | None:
    """The version that a cache entry holds; None where it holds none, or a broken one."""
    try:
        return Record(**json.loads((home / "record.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None


def write_record(home: Path, record: Record) -> None:
    """From now on the entry holds this version."""
    write_atomically(home / "record.json", json.dumps(asdict(record)))


def write_atomically(path: Path, text: str) -> None:
    """Whole, or not at all, also where the machine stops meanwhile."""
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def unchanged(record: Record, *, thorough: bool) -> bool:
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
        return list(digest_all(folder / name for name in known)) == list(known.values())
    except OSError:
        return False


def digest_all(files: Iterable[Path]) -> Iterator[str]:
    """The SHA-256 of each, four at a time."""
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


def cache_broken(cache: Path, error: OSError) -> RunError:
    """The error for a cache that cannot be written to."""
    return RunError(
        Cause.OUT_OF_DISK if disk_is_full(error) else Cause.STORAGE_UNAVAILABLE,
        f"cannot write to the cache {cache}: {error}. Check its free space and permissions ("
        + where_it_runs(
            cluster="the profile's cache, or the pods' ephemeral storage", machine="FINETUNE_CACHE names another folder"
        )
        + ").",
    )
