"""Rows that say again what an earlier one has said: the same words, or nearly.

Near duplicates are found by MinHash with locality-sensitive hashing (Broder 1997; Leskovec, Rajaraman, Ullman, "Mining
of Massive Datasets", chapter 3): rows are sets of three words in a row (a Chinese character is a word), 128 minima
estimate the share two sets have in common, and only rows that agree in a whole band of minima are compared. About 1 KB
of memory a row; the exact kind needs 100 bytes. Called by ``data/__init__.py``.
"""

import re
import zlib
from collections.abc import Callable, Iterable
from hashlib import blake2b
from typing import Any, Literal

import numpy as np

from finetune_trainer.data.records import (
    Conversation,
    Judged,
    Labelled,
    Message,
    Preference,
    Prompt,
    SourceTarget,
    Tagged,
    Text,
)

_MINIMA = 128
_SHINGLE = 3  # words
_WORD = re.compile(r"[^\W_一-鿿぀-ヿ가-힯]+|[一-鿿぀-ヿ가-힯]")
_DRAW = np.random.PCG64(20210413)  # its raw stream is fixed for all versions of numpy
_FACTORS = _DRAW.random_raw(_MINIMA) | np.uint64(1)
_TERMS = _DRAW.random_raw(_MINIMA)


class Duplicates:
    """What was said so far."""

    def __init__(self, kind: Literal["exact", "near"], threshold: float) -> None:
        self._known = self._exactly if kind == "exact" else self._nearly
        self._threshold = threshold
        self._digests: set[int] = set()
        self._rows_in_band = _rows_in_band(threshold)
        self._bands: dict[tuple[int, int], list[int]] = {}
        self._signatures: list[np.ndarray] = []
        self.sources = 0
        """How many of the configuration's sources it has seen."""

    def repeats(self, record: Any) -> bool:
        """An earlier record says it already; else it is remembered."""
        return self._known(said(record))

    def catch_up(self, sources: Iterable[Callable[[], Iterable[Any]]], wanted: int) -> None:
        """See the sources before number ``wanted`` whose tokens were found in the cache."""
        for number, records in enumerate(sources):
            if self.sources <= number < wanted:
                for record in records():
                    self.repeats(record)
                self.sources = number + 1

    def _exactly(self, text: str) -> bool:
        digest = int.from_bytes(blake2b(" ".join(text.split()).encode(), digest_size=8).digest())
        if digest in self._digests:
            return True
        self._digests.add(digest)
        return False

    def _nearly(self, text: str) -> bool:
        signature = minima(text)
        bands = [
            (start, hash(signature[start : start + self._rows_in_band].tobytes()))
            for start in range(0, _MINIMA - self._rows_in_band + 1, self._rows_in_band)
        ]
        candidates = {row for band in bands for row in self._bands.get(band, ())}
        if any(float((self._signatures[row] == signature).mean()) >= self._threshold for row in candidates):
            return True
        for band in bands:
            self._bands.setdefault(band, []).append(len(self._signatures))
        self._signatures.append(signature)
        return False


def minima(text: str) -> np.ndarray:
    """uint32 (128,): two of them agree in the share of three-word sequences that their texts have in common."""
    words = [zlib.crc32(word.encode()) for word in _WORD.findall(text.casefold())] or [zlib.crc32(text.encode())]
    codes = np.array(words, np.uint64)
    with np.errstate(over="ignore"):
        count = max(1, len(codes) - _SHINGLE + 1)
        shingles = np.zeros(count, np.uint64)
        for offset in range(min(_SHINGLE, len(codes))):
            shingles = (shingles + codes[offset : offset + count]) * np.uint64(0x9E3779B97F4A7C15)
            shingles ^= shingles >> np.uint64(29)
        hashed = _FACTORS[:, None] * shingles[None, :] + _TERMS[:, None]
    return (hashed >> np.uint64(32)).min(axis=1).astype(np.uint32)


def _rows_in_band(threshold: float) -> int:
    """The longest bands by which rows that share ``threshold`` are found with a probability of 95 %."""
    fitting = [r for r in range(1, 33) if 1 - (1 - threshold**r) ** (_MINIMA // r) >= 0.95]
    return max(fitting, default=1)


def said(record: Any) -> str:
    """The words of a record. System prompts and what templates add are the same in many rows, and do not count."""
    match record:
        case Text():
            return record.text
        case Conversation() | Prompt():
            return _words(record.messages)
        case Preference():
            return _words([*record.prompt, *record.chosen, *record.rejected])
        case Judged():
            return _words([*record.prompt, *record.completion])
        case Labelled():
            return f"{record.text}\n{record.text_pair or ''}\n{record.label}"
        case Tagged():
            return " ".join(record.tokens)
        case SourceTarget():
            return f"{record.source}\n{record.target}"
    raise TypeError(type(record).__name__)


def _words(messages: list[Message]) -> str:
    return "\n".join(
        f"{message['content']} {message.get('tool_calls') or ''}"
        for message in messages
        if message["role"] not in ("system", "developer")
    )
