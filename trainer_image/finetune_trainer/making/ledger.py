"""What models were asked and what they answered, kept in the checkpoint storage: nothing is asked twice.

An entry is a key, made of all that the answer depends on, and a JSON value. It is written before :meth:`Ledger.put`
returns, as an object of its own; every so many of them are folded into one file of lines. A later attempt, with any
number of processes, reads all of it. Entries never change, so that writers need not know of each other.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from finetune_trainer.storage import Store

FOLDER = "asked"
FOLDED = 500
"""Objects that are made one."""
_READERS = 16


def key_of(**facts: Any) -> str:
    """The key of an entry: a digest of what its value depends on."""
    text = json.dumps(facts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Ledger:
    """Values by key. Safe in threads."""

    def __init__(self, store: Store, writer: str) -> None:
        """``writer``: a name that no other process, of this or an earlier attempt, has."""
        self._store = store
        self._writer = writer
        self._known: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._number = 0
        self._open: dict[int, _Part] = {0: _Part()}

    def load(self) -> int:
        """Read what all writers have written; how many entries are known now. Collective with nothing."""
        paths = [entry.path for entry in self._store.list(FOLDER)]
        lines = [path for path in paths if path.endswith(".jsonl")]
        single = [path for path in paths if path.endswith(".json")]
        with ThreadPoolExecutor(_READERS) as pool:
            for content in pool.map(self._read, [*lines, *single]):
                for key, value in _entries(content):
                    self._known[key] = value
        return len(self._known)

    def _read(self, path: str) -> bytes:
        try:
            return self._store.get(path)
        except FileNotFoundError:  # folded meanwhile: its lines are in a file that is there already
            return b""

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def get(self, key: str) -> Any:
        """The value; None where there is none."""
        return self._known.get(key)

    def put(self, key: str, value: Any) -> None:
        """Keep a value. When this returns it outlives the process. RunError where it cannot be written."""
        with self._lock:
            number, part = self._number, self._open[self._number]
            part.awaited += 1
            if part.awaited + len(part.entries) >= FOLDED:
                self._number += 1
                self._open[self._number] = _Part()
        self._store.put(f"{self._folder(number)}/{key}.json", _line(key, value))
        with self._lock:
            self._known[key] = value
            part.entries[key] = value
            part.awaited -= 1
            full = number != self._number and not part.awaited
            if full:
                del self._open[number]
        if full:
            self._store.put(f"{self._folder(number)}.jsonl", b"".join(_line(*entry) for entry in part.entries.items()))
            self._store.delete(self._folder(number))

    def _folder(self, number: int) -> str:
        return f"{FOLDER}/{self._writer}-{number:06d}"


class _Part:
    """Entries that become one file."""

    def __init__(self) -> None:
        self.entries: dict[str, Any] = {}
        self.awaited = 0


def _line(key: str, value: Any) -> bytes:
    return json.dumps({"key": key, "value": value}, ensure_ascii=False).encode() + b"\n"


def _entries(content: bytes) -> Iterator[tuple[str, Any]]:
    for line in content.splitlines():
        try:
            entry = json.loads(line)
            yield entry["key"], entry["value"]
        except (ValueError, KeyError, TypeError):  # damaged: asked again
            continue
