"""Objects as JSON files: the local cluster's etcd. Called by ``local.py`` and, to read, by ``cli/``.

``ROOT/NAMESPACE/NAME/`` is one FineTuneJob with everything made for it::

    finetunejob.json          the job and its status
    objects/KIND-NAME.json    Jobs, Pods, ConfigMaps, Services, NetworkPolicies
    logs/POD/CONTAINER.log    stays when the pod goes
    pods/POD/                 volumes and termination messages; goes with the pod
    events.jsonl
    earlier/N/                the same of the runs before this one

Every file is replaced as a whole, so that a reader never sees half of one. Nothing here decides or starts anything.
"""

import contextlib
import fcntl
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from finetune_operator.cluster import Object


def read_json(path: Path) -> Object | None:
    """The object in a file; None where there is none."""
    try:
        found: Object = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    return found


def write_json(path: Path, value: Object) -> None:
    """Replace a file as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(value, indent=1, ensure_ascii=False))
    beside.replace(path)


class Folder:
    """One FineTuneJob on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._claim: int | None = None

    # --- the FineTuneJob itself

    @property
    def job(self) -> Object | None:
        """The FineTuneJob with its status."""
        return read_json(self.path / "finetunejob.json")

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Hold while the FineTuneJob is read, changed and written: ``finetune suspend`` may run beside a run."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".change").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def write_job(self, job: Object) -> None:
        """Replace the FineTuneJob. Only inside :meth:`changing`."""
        write_json(self.path / "finetunejob.json", job)

    # --- one owner at a time

    def claim(self) -> bool:
        """Become the only process that runs this job; False where another one does. Goes with the process."""
        if self._claim is not None:
            return True
        self.path.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path / ".claim", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            return False
        self._claim = handle
        return True

    def release(self) -> None:
        """Give the claim up."""
        if self._claim is not None:
            os.close(self._claim)
            self._claim = None

    # --- what is made for it

    def _object(self, kind: str, name: str) -> Path:
        return self.path / "objects" / f"{kind}-{name}.json"

    def get(self, kind: str, name: str) -> Object | None:
        """One object."""
        return read_json(self._object(kind, name))

    def list(self, *kinds: str) -> list[Object]:
        """All objects of these kinds, by name."""
        paths = [p for kind in kinds for p in sorted((self.path / "objects").glob(f"{kind}-*.json"))]
        return [found for path in paths if (found := read_json(path)) is not None]

    def put(self, manifest: Object) -> None:
        """Make or replace an object."""
        write_json(self._object(manifest["kind"], manifest["metadata"]["name"]), manifest)

    def remove(self, kind: str, name: str) -> None:
        """Take an object away, and a pod's folder with it."""
        self._object(kind, name).unlink(missing_ok=True)
        if kind == "Pod":
            shutil.rmtree(self.pod(name), ignore_errors=True)

    def pod(self, name: str) -> Path:
        """A pod's folder."""
        return self.path / "pods" / name

    def log(self, pod: str, container: str) -> Path:
        """A container's log."""
        return self.path / "logs" / pod / f"{container}.log"

    def forget(self) -> None:
        """Everything goes but the claim."""
        for entry in self.path.iterdir() if self.path.exists() else ():
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.name != ".claim":
                entry.unlink(missing_ok=True)

    def put_aside(self) -> None:
        """Everything but the claim moves into ``earlier/N``: a new run begins, and the logs of this one stay."""
        entries = [entry for entry in self.path.iterdir() if entry.name not in (".claim", ".change", EARLIER)]
        if entries:
            place = free(self.path / EARLIER / "1")
            place.mkdir(parents=True)
            for entry in entries:
                entry.rename(place / entry.name)

    def tell(self, event: Object) -> None:
        """Add an event."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "events.jsonl").open("a") as file:
            file.write(json.dumps(event, ensure_ascii=False) + "\n")


EARLIER = "earlier"


def free(path: Path) -> Path:
    """The first of ``…1``, ``…2``, ``…3`` that is not there."""
    stem = path.name.removesuffix("1")
    return next(found for number in itertools.count(1) if not (found := path.with_name(f"{stem}{number}")).exists())


def folders(root: Path) -> list[Folder]:
    """Every FineTuneJob below ``root``, by namespace and name."""
    return [Folder(path.parent) for path in sorted(root.glob("*/*/finetunejob.json"))]


def tail(path: Path, lines: int, limit: int = 65536) -> list[str]:
    """Last lines of a text file; empty where there is none."""
    try:
        with path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - limit))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    # A progress bar writes over its line: what stands at the end is what a terminal shows.
    return [line.rsplit("\r", 1)[-1] for line in text.splitlines(keepends=False)][-lines:]
