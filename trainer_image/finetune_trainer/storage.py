"""One folder of an object store (s3, gs, az) or of a file system (file), behind one class.

Used by ``fetch.py``, ``checkpoint.py`` and ``report.py``. It moves bytes and never interprets them. Everything
that goes wrong leaves here as a ``RunError`` that names the URI, what was tried and what to do, except for a
missing object (``FileNotFoundError``), which callers handle.
"""

import hashlib
import logging
import math
import os
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.error import HTTPError
from urllib.parse import unquote
from urllib.request import Request, urlopen

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    InvalidPathError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import AzureStore, GCSStore, LocalStore, S3Store

from finetune_api.causes import Cause
from finetune_trainer.outcome import RunError, disk_is_full, where_it_runs

log = logging.getLogger(__name__)

SCHEMES = ("s3", "gs", "az", "file")

_PART = 16 * 2**20  # bytes of one request; 8 at a time keep a 10 Gbit/s link busy and 128 MiB in memory
_PARALLEL = 8
_MAX_PARTS = 9000  # S3 takes 10,000 parts per object; larger files get larger parts
_PATIENCE = 60.0  # seconds of retries: a gateway that restarts is no reason to end a run
# The timeout covers one whole request, and a request moves at most one part.
_CLIENT: dict[str, Any] = {"connect_timeout": timedelta(seconds=10), "timeout": timedelta(seconds=120)}

_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (for another provider than AWS also AWS_ENDPOINT_URL), "
    "a service account with an IAM role, or AWS_SKIP_SIGNATURE=true for a public bucket",
    "gs": "GOOGLE_SERVICE_ACCOUNT (path of a key file), GOOGLE_SERVICE_ACCOUNT_KEY, or workload identity",
    "az": "AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN, or workload identity",
    "file": "read and write permission for this process's user id",
}


@dataclass(frozen=True)
class Entry:
    """One object below a store's folder."""

    path: str
    """Relative to the folder, with forward slashes."""
    size: int
    """Bytes."""
    version: str = ""
    """What changes when the content does: the ETag, or for file:// inode, size and time of change."""


def digest(data: bytes) -> str:
    """``sha256:<hex>`` of bytes."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def file_digest(path: Path) -> str:
    """``sha256:<hex>`` of a file, read once, in constant memory. OSError where it cannot be read."""
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Bring every file below a folder to the disk, so that what is named complete is complete after a crash too."""
    for path in [folder, *folder.rglob("*")]:
        _sync_path(path)


def _sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def scheme_of(uri: str) -> str:
    """``s3`` of ``s3://bucket/key``. RunError where it is none of :data:`SCHEMES`."""
    scheme, separator, _ = uri.partition("://")
    if not separator or scheme not in SCHEMES:
        raise RunError(
            Cause.INVALID_CONFIGURATION,
            f"{uri!r} is no storage URI; accepted: s3://BUCKET/PATH, gs://BUCKET/PATH, az://CONTAINER/PATH, "
            "file:///PATH",
        )
    return scheme


def local_path(uri: str) -> Path:
    """The path of a ``file:///…`` URI. Percent escapes are decoded, as ``Path.as_uri()`` writes them."""
    return Path(unquote(uri.removeprefix("file://")))


class Store:
    """A folder. Paths are relative to it, with forward slashes; it comes into being with its first object."""

    def __init__(self, uri: str, patience: float = _PATIENCE) -> None:
        """No request is made. Endpoint and credentials come from the environment (see :data:`_CREDENTIALS`).

        A request that fails is repeated with growing pauses for at most ``patience`` seconds.
        """
        self._patience = patience
        self._scheme = scheme_of(uri)
        # The client takes a//b for a/b, so that is what is told, too.
        rest = re.sub("/{2,}", "/", uri.split("://", 1)[1]).rstrip("/")
        self._uri = f"{self._scheme}://{rest}"
        self._root: Path | None = None
        with self._errors("open", ""):
            self._store = self._open()

    def _open(self) -> Any:
        if self._scheme == "file":
            self._root = local_path(self._uri)
            return LocalStore("/")
        bucket, _, prefix = self._uri.split("://", 1)[1].partition("/")
        backoff = {"init_backoff": timedelta(seconds=0.2), "max_backoff": timedelta(seconds=10), "base": 2}
        common: dict[str, Any] = {
            "prefix": prefix.strip("/") or None,
            "retry_config": {
                "max_retries": 12,
                "retry_timeout": timedelta(seconds=self._patience),
                "backoff": backoff,
            },
        }
        client: Any = dict(_CLIENT)
        if self._scheme == "gs":
            return GCSStore(bucket, client_options=client, **common)
        if self._scheme == "az":
            endpoint = os.environ.get("AZURE_STORAGE_ENDPOINT", "")
            client["allow_http"] = endpoint.startswith("http://")
            return AzureStore(bucket, client_options=client, **common)
        endpoint = _s3_endpoint()
        config: Any = {
            "region": _s3_region(),
            "conditional_put": "etag",
        }
        if endpoint:
            # Other providers and test servers have no DNS name per bucket.
            config |= {"endpoint": endpoint, "virtual_hosted_style_request": False}
            client["allow_http"] = endpoint.startswith("http://")
        return S3Store(bucket, config=config, client_options=client, **common)

    def uri(self, path: str = "") -> str:
        """Full URI of an object, or of the folder itself, without a trailing slash."""
        return f"{self._uri}/{path}" if path else self._uri

    def put(self, path: str, data: bytes | Path) -> None:
        """Write an object, whole or not at all; replaces an older one. A ``Path`` is streamed in parts."""
        size = data.stat().st_size if isinstance(data, Path) else len(data)
        part = max(_PART, math.ceil(size / _MAX_PARTS))
        with self._errors("write", path, writing=True):
            obstore.put(self._store, self._key(path), data, chunk_size=part, max_concurrency=_PARALLEL)
            self._sync(path)

    def put_if_absent(self, path: str, data: bytes) -> bool:
        """Write an object unless one is there; of several writers exactly one gets True.

        After a lost answer it may be False although the object is this writer's: who must know puts a name of
        its own into ``data`` and compares. S3-compatible servers must honour ``If-None-Match: *``.
        """
        with self._errors("create", path, writing=True):
            try:
                obstore.put(self._store, self._key(path), data, mode="create")
            except (AlreadyExistsError, PreconditionError):
                return False
            self._sync(path)
        return True

    def get(self, path: str) -> bytes:
        """The content of an object, in memory. FileNotFoundError where there is none."""
        with self._errors("read", path):
            return bytes(obstore.get(self._store, self._key(path)).bytes())

    def download(self, path: str, to: Path) -> None:
        """Copy an object into the file ``to`` (its folder must exist), in parallel parts and constant memory.

        FileNotFoundError where there is none. ``to`` is incomplete after an error.
        """
        key = self._key(path)
        with self._errors("read", path):
            meta = obstore.head(self._store, key)
            size, etag = meta["size"], meta["e_tag"]
            with to.open("wb") as file:
                file.truncate(size)

                def copy(start: int) -> None:
                    options: Any = {"range": (start, min(start + _PART, size))}
                    if etag:  # all parts must be of one and the same object
                        options["if_match"] = etag
                    part = obstore.get(self._store, key, options=options).bytes()
                    os.pwrite(file.fileno(), part, start)

                starts = range(0, size, _PART)
                if len(starts) == 1:
                    copy(0)
                elif starts:
                    with ThreadPoolExecutor(_PARALLEL) as pool:
                        for _ in pool.map(copy, starts):
                            pass
                file.flush()
                os.fsync(file.fileno())

    def list(self, prefix: str = "") -> "list[Entry]":
        """Every object below the folder ``prefix`` (or the one object of that name), sorted by path.

        Markers of folders are none: the objects of no size, named ``sub/``, that consoles and Hadoop make.
        """
        with self._errors("list", prefix):
            found = list(self._walk(prefix))
            if self._root is None:
                folders = {str(folder) for entry in found for folder in PurePosixPath(entry.path).parents}
                # The client tells sub/ as sub; asked for sub, the storage knows of none.
                found = [e for e in found if e.size or (e.path not in folders and self._head(e.path) is not None)]
        return sorted(found, key=lambda entry: entry.path)

    def find(self, path: str) -> Entry | None:
        """The object of that very name; None where there is none, or a folder."""
        with self._errors("look for", path):
            if self._root is None:
                return self._head(path)
            file = self._root / path
            return _file_entry(file, path) if file.is_file() else None

    def _head(self, path: str) -> Entry | None:
        try:
            return _entry(obstore.head(self._store, path), path)
        except FileNotFoundError:
            return None

    def _walk(self, prefix: str) -> "Iterator[Entry]":
        """As :meth:`list`, with markers, in no order."""
        if self._root is not None:
            base = self._root / prefix if prefix else self._root
            if prefix and base.is_file():
                yield _file_entry(base, prefix)
                return
            for folder, _, names in os.walk(base):
                for name in names:
                    file = Path(folder, name)
                    # obstore's own unfinished files end in #N
                    if not (name.rpartition("#")[1] and name.rpartition("#")[2].isdigit()):
                        # it may have gone meanwhile, or be a link into nowhere
                        with suppress(FileNotFoundError):
                            yield _file_entry(file, str(file.relative_to(self._root)))
            return
        below = False
        for chunk in obstore.list(self._store, prefix=prefix.strip("/") or None):
            for meta in chunk:
                if meta["path"]:  # none: the marker of this folder itself
                    below |= meta["path"] != prefix
                    yield _entry(meta, meta["path"])
        if prefix and not below and (one := self._head(prefix)) is not None:
            yield one

    def delete(self, prefix: str) -> None:
        """Delete everything below the folder ``prefix``, or the one object of that name. Missing is fine.

        Markers of folders stay where somebody made them: the client has no name for them, and :meth:`list` passes
        them over.
        """
        with self._errors("delete", prefix, writing=True):
            if self._root is not None:
                _delete_files(self._root / prefix)
                return
            keys = sorted({entry.path for entry in self._walk(prefix)})
            for start in range(0, len(keys), 1000):
                # a key may be gone: somebody else deletes too
                with suppress(FileNotFoundError):
                    obstore.delete(self._store, keys[start : start + 1000])

    def _key(self, path: str) -> str:
        return str(self._root / path).lstrip("/") if self._root is not None else path

    def _sync(self, path: str) -> None:
        """What was written to a file system outlives a crash of the node: a manifest written later then
        never names files that are not there."""
        if self._root is None:
            return
        file = self._root / path
        _sync_path(file)
        _sync_path(file.parent)

    @contextmanager
    def _errors(self, verb: str, path: str, writing: bool = False) -> Iterator[None]:
        """Translate what obstore raises. A missing object stays a FileNotFoundError unless ``writing``."""
        where = self.uri(path)
        try:
            yield
        except RunError:
            raise
        except (BaseError, OSError, ValueError) as error:
            reason = _reason(error)
            if isinstance(error, InvalidPathError):
                raise RunError(Cause.INVALID_CONFIGURATION, self._odd_name(verb, where, reason)) from error
            if self._scheme != "file" and any(host in str(error) for host in _CREDENTIAL_HOSTS):
                raise RunError(Cause.ACCESS_DENIED, self._denied(verb, where, "no credentials were found")) from error
            if isinstance(error, _DENIED) or any(code in str(error) for code in _DENIED_CODES):
                if (skew := self._skew(str(error))) is not None:
                    raise RunError(Cause.CLOCK_SKEW, self._wrong_clock(verb, where, skew)) from error
                raise RunError(Cause.ACCESS_DENIED, self._denied(verb, where, reason)) from error
            if isinstance(error, FileNotFoundError) and not writing:
                raise FileNotFoundError(f"{where} does not exist{self._through()}") from error
            if isinstance(error, FileNotFoundError) or any(code in str(error) for code in _NO_BUCKET_CODES):
                raise RunError(
                    Cause.INVALID_CONFIGURATION,
                    f"cannot {verb} {where}{self._through()}: the bucket or container does not exist. "
                    "Create it or correct the URI.",
                ) from error
            remedy = (
                "Check the free space and the mount."
                if self._scheme == "file"
                else f"Tried for up to {self._patience:g} s. Check the endpoint, DNS and network policies."
            )
            cause = Cause.OUT_OF_DISK if disk_is_full(error) else Cause.STORAGE_UNAVAILABLE
            raise RunError(cause, f"cannot {verb} {where}{self._through()}: {reason}. {remedy}") from error

    def _denied(self, verb: str, where: str, why: str) -> str:
        remedy = where_it_runs(
            cluster="put them into a Secret and name it in spec.credentials.secretName.",
            machine="set them in the environment of the finetune command.",
        )
        who = where_it_runs(cluster="The pods need", machine="Needed:")
        if self._scheme == "file":
            remedy = "check its owner and mode."
        return f"not allowed to {verb} {where}{self._through()}: {why}. {who} {_CREDENTIALS[self._scheme]}; {remedy}"

    def _skew(self, refusal: str) -> timedelta | None:
        """How far this machine's clock is ahead of the storage's, where that is why it refuses; else None."""
        if self._scheme == "file":
            return None
        told = re.search("<ServerTime>([^<]+)</ServerTime>", refusal)
        there = datetime.fromisoformat(told[1]) if told else _date_of(self._address())
        skew = datetime.now(UTC) - there if there is not None else timedelta()
        return skew if abs(skew) > _SKEW_ALLOWED or any(code in refusal for code in _SKEW_CODES) else None

    def _address(self) -> str:
        """Of the server, for a question that needs no credentials."""
        if self._scheme == "gs":
            return "https://storage.googleapis.com"
        if self._scheme == "az":
            account = os.environ.get("AZURE_STORAGE_ACCOUNT_NAME", "")
            return os.environ.get("AZURE_STORAGE_ENDPOINT") or f"https://{account}.blob.core.windows.net"
        return _s3_endpoint() or f"https://s3.{_s3_region()}.amazonaws.com"

    def _wrong_clock(self, verb: str, where: str, skew: timedelta) -> str:
        here = datetime.now(UTC)
        minutes = max(1, round(abs(skew) / timedelta(minutes=1)))
        side = "ahead of" if skew > timedelta() else "behind"
        return (
            f"cannot {verb} {where}{self._through()}: the clock of this machine ({socket.gethostname()}) is {minutes} "
            f"minutes {side} the storage's, which refuses requests of another time. Here it is {here:%Y-%m-%d %H:%M} "
            f"UTC, there {here - skew:%Y-%m-%d %H:%M}. Set the node's clock right (chrony, systemd-timesyncd)."
        )

    def _odd_name(self, verb: str, where: str, why: str) -> str:
        return (
            f"cannot {verb} {where}{self._through()}: an object there has a name that the client cannot read: {why}. "
            "Accepted: names in which no part between slashes is empty (a//b), '.' or '..'. Rename or delete the "
            "object, or name a folder without it."
        )

    def _through(self) -> str:
        endpoint = _s3_endpoint()
        return f" (endpoint {endpoint})" if self._scheme == "s3" and endpoint else ""


_DENIED = (PermissionDeniedError, UnauthenticatedError, PermissionError)
# Some answers come with a status that obstore does not map to these classes.
_DENIED_CODES = (
    "InvalidAccessKeyId",
    "XAdminUserNotFound",  # versitygw's word for it, with status 404
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "403 Forbidden",
    "401 Unauthorized",
    "os error 13",
)
_SKEW_CODES = (
    "RequestTimeTooSkewed",
    "Request date header too old",  # Azure
    "reasonable timeframe",  # of a token that Google is asked for
)
_SKEW_ALLOWED = timedelta(minutes=14)  # AWS, Google and Azure allow 15
_NO_BUCKET_CODES = ("NoSuchBucket", "ContainerNotFound", "The specified bucket does not exist")
# Asked for credentials where the environment holds none.
_CREDENTIAL_HOSTS = ("169.254.169.254", "metadata.google.internal", "metadata/identity")


def _s3_endpoint() -> str:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""


def _s3_region() -> str:
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"


def _date_of(address: str) -> datetime | None:
    """The time it is for a web server, to the second; None where it does not tell."""
    try:
        with urlopen(Request(address, method="HEAD"), timeout=5) as answer:
            told = answer.headers
    except HTTPError as refused:
        told = refused.headers
    except (OSError, ValueError):
        return None
    try:
        return parsedate_to_datetime(told["Date"]).astimezone(UTC)
    except (TypeError, ValueError):
        return None


def _entry(meta: Any, path: str) -> Entry:
    return Entry(path, meta["size"], meta["e_tag"] or str(meta["last_modified"]))


def _file_entry(file: Path, path: str) -> Entry:
    stat = file.stat()
    return Entry(path, stat.st_size, f"{stat.st_ino}-{stat.st_size}-{stat.st_mtime_ns}")


def _delete_files(top: Path) -> None:
    """A file, or a folder with everything in it, also what a crash left half written."""
    if top.is_dir():
        for folder, _, names in os.walk(top, topdown=False):
            for name in names:
                Path(folder, name).unlink(missing_ok=True)
            with suppress(OSError):  # not empty: somebody writes there
                Path(folder).rmdir()
    else:
        top.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    """What the storage said, in a line: obstore hides it in XML or in a dump of its own structures."""
    text = str(error)
    code, message = (re.search(f"<{tag}>([^<]*)</{tag}>", text) for tag in ("Code", "Message"))
    if code:
        return f"{code[1]} ({message[1].rstrip('.')})" if message else code[1]
    inner = re.findall(r'\b(?:message|error): "([^"]+)"', text)
    if inner:
        return str(inner[-1])
    line = text.strip().split("\n", 1)[0].strip()
    return (line or type(error).__name__)[:500]
