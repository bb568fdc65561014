"""The GPUs of this machine, and who uses which. Called by ``local.py`` and, for its messages, by ``cli/``.

Knows no framework: importing torch to count devices would cost seconds. Every GPU in use is held by a file lock, so
that two ``finetune run`` beside each other never share one; the lock goes with the process that holds it.
"""

import contextlib
import fcntl
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

_LOCKS = Path(tempfile.gettempdir()) / "finetune-operator-gpus"
_NVIDIA_SMI = ["nvidia-smi", "--query-gpu=index,uuid", "--format=csv,noheader"]


def visible() -> tuple[str, ...]:
    """The GPUs a run may use, as CUDA_VISIBLE_DEVICES names them; what that variable hides is not among them."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    there = _there()
    if chosen is None:
        return tuple(index for index, _ in there)
    known = {name: index for index, uuid in there for name in (index, uuid)}
    names = [name.strip() for name in chosen.split(",") if name.strip()]
    # As CUDA does: the list ends before the first name that is not there. MIG names are taken as they are.
    kept = []
    for name in names:
        if name not in known and not name.startswith("MIG-"):
            break
        kept.append(known.get(name, name))
    return tuple(kept)


def _there() -> list[tuple[str, str]]:
    """Index and UUID of every GPU."""
    try:
        answer = subprocess.run(_NVIDIA_SMI, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    pairs = [line.split(",") for line in answer.splitlines() if "," in line]
    return [(index.strip(), uuid.strip()) for index, uuid in pairs]


class Gpus:
    """A share of the GPUs for each gang."""

    def __init__(self, names: Sequence[str], locks: Path = _LOCKS) -> None:
        self.names = tuple(names)
        self._locks = locks
        self._held: dict[str, int] = {}

    def take(self, count: int) -> list[str] | None:
        """That many GPUs, or None where not as many are free now."""
        taken: list[str] = []
        for name in self.names:
            if len(taken) == count:
                break
            if name not in self._held and self._lock(name):
                taken.append(name)
        if len(taken) == count:
            return taken
        self.give(taken)
        return None

    def give(self, names: Sequence[str]) -> None:
        """Back to whoever waits."""
        for name in names:
            os.close(self._held.pop(name))

    def _lock(self, name: str) -> bool:
        with contextlib.suppress(OSError):
            self._locks.mkdir(mode=0o1777, parents=True, exist_ok=True)
            self._locks.chmod(0o1777)  # mkdir's mode goes through the umask; other users take GPUs here too
        path = self._locks / name.replace("/", "_")
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:  # another user's: reading is enough to lock
            handle = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            return False
        self._held[name] = handle
        return True
