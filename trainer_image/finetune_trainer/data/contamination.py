"""Held-out rows that the model has seen in training: they tell nothing about what it has learned.

As GPT-3's report (arXiv:2005.14165, appendix C) does with words, sequences of 13 tokens are compared. A held-out row
counts as seen where at least half of its sequences stand somewhere in the training rows. What many held-out rows have
in common (templates, system prompts) is not compared. Pure; called by ``data/__init__.py``.
"""

from collections.abc import Iterator

import numpy as np

from finetune_trainer.data.stream import Rows

LENGTH = 13
"""Tokens compared at a time; a shorter row is compared whole."""
_COMMON = 0.05  # share of the held-out rows from which on a sequence is taken for a template's
_PIECE = 2**20  # training tokens looked at together


def seen(held_out: Rows, training: list[Rows]) -> np.ndarray:
    """bool (R,): at least half of the row stands in the training rows."""
    codes, owners = _of_rows(held_out)
    if not len(codes):
        return np.zeros(len(held_out), bool)
    distinct, places = np.unique(codes, return_inverse=True)
    pairs = np.unique(np.stack([places, owners]), axis=1)
    rows_with = np.bincount(pairs[0], minlength=len(distinct))
    common = rows_with > max(3, _COMMON * len(held_out))
    found = np.zeros(len(distinct), bool)
    for rows in training:
        for code in _pieces(rows):
            spots = np.searchsorted(distinct, code)
            spots[spots == len(distinct)] = 0
            found[spots[distinct[spots] == code]] = True
    counted = ~common[pairs[0]]
    told = np.bincount(pairs[1][counted], minlength=len(held_out))
    hits = np.bincount(pairs[1][counted & found[pairs[0]]], minlength=len(held_out))
    return (told > 0) & (2 * hits >= told)


def _of_rows(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """The codes of all sequences of all rows, and whose they are."""
    codes, owners = [], []
    for number in range(len(rows)):
        for part in range(rows.parts):
            at = number * rows.parts + part
            code = _codes(rows.ids[rows.starts[at] : rows.starts[at + 1]])
            codes.append(code)
            owners.append(np.full(len(code), number))
    empty = np.zeros(0, np.int64)
    return (np.concatenate(codes), np.concatenate(owners)) if codes else (empty.astype(np.uint64), empty)


def _pieces(rows: Rows) -> Iterator[np.ndarray]:
    """The codes of a source, a piece at a time. Where rows meet, sequences of both come of it: of no row, no harm."""
    for begin in range(0, len(rows.ids), _PIECE):
        yield _codes(rows.ids[begin : begin + _PIECE + LENGTH - 1])
    lengths = np.diff(rows.starts)
    for number in np.flatnonzero(lengths < LENGTH):
        yield _codes(rows.ids[rows.starts[number] : rows.starts[number + 1]])


def _codes(ids: np.ndarray) -> np.ndarray:
    """uint64: one number for every sequence of :data:`LENGTH` tokens; for all of a shorter one."""
    length = min(LENGTH, len(ids))
    if not length:
        return np.zeros(0, np.uint64)
    whole = ids.astype(np.uint64)
    count = len(ids) - length + 1
    code = np.full(count, length, np.uint64)
    with np.errstate(over="ignore"):
        for offset in range(length):
            code = (code ^ whole[offset : offset + count]) * np.uint64(0x9E3779B97F4A7C15)
            code ^= code >> np.uint64(31)
    return code
