"""Which item comes when: a pure function of (seed, epoch, index), on every machine and after every restart.

Rows are kept as flat arrays; a row is one sequence of tokens or several (a preference: the better and the worse
answer), with numbers beside them. An epoch is a list of rows (each source as often as its weight says), shuffled; with
packing it is a list of packs of whole rows. Nothing depends on the number of processes, on time, or on the version of
a random number library. Called by ``data/__init__.py`` (which builds it), ``feed.py`` and ``engine.py``.
"""

import math
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from finetune_trainer.data.render import Tokens

IGNORED = -100
"""Label of a token that is not learned (torch's cross_entropy ignores it)."""

_WINDOW = 4096  # rows that are packed together: enough to fill over 99 %, few enough to keep the order random
_KEPT_EPOCHS = 3  # an evaluation may look back while the next epoch is read ahead


@dataclass(frozen=True)
class Draft:
    """A row as it is put together: its sequences, and its numbers by name."""

    sequences: tuple[Tokens, ...]
    numbers: Mapping[str, Any] = field(default_factory=dict)
    """Numbers, or lists of as many numbers for every row."""
    note: str = ""
    """What is kept of the row as it is."""


@dataclass(frozen=True)
class Rows:
    """The rows of one source: R rows of P sequences each, T tokens in all, in the order of the file."""

    name: str
    ids: np.ndarray
    """int32 (T,)"""
    learned: np.ndarray
    """bool (T,)"""
    starts: np.ndarray
    """int64 (R x P + 1,): sequence p of row r is ids[starts[r x P + p] : starts[r x P + p + 1]]."""
    parts: int = 1
    """P, the same for all rows."""
    labels: np.ndarray | None = None
    """int32 (T,): what is learned at each token, where that is not the token itself (tags)."""
    numbers: dict[str, np.ndarray] = field(default_factory=dict)
    """(R,) or (R, k) by name: what a row says beside its sequences, e.g. its margin, its label, its task."""
    notes: np.ndarray | None = None
    """uint8: the notes of all rows in UTF-8, one after the other."""
    note_starts: np.ndarray | None = None
    """int64 (R + 1,): where they begin."""

    @staticmethod
    def of(name: str, rows: Iterable[Draft]) -> "Rows":
        """Gather tokenised rows."""
        kept = list(rows)
        sequences = [sequence for row in kept for sequence in row.sequences]
        lengths = np.array([len(sequence.ids) for sequence in sequences], dtype=np.int64)
        tagged = bool(sequences) and sequences[0].labels is not None
        notes = [row.note.encode() for row in kept] if any(row.note for row in kept) else None
        return Rows(
            name,
            np.concatenate([part.ids for part in sequences]) if kept else np.zeros(0, np.int32),
            np.concatenate([part.learned for part in sequences]) if kept else np.zeros(0, bool),
            np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
            len(kept[0].sequences) if kept else 1,
            np.concatenate([part.labels for part in sequences]) if tagged else None,
            {key: _numbers([row.numbers[key] for row in kept]) for key in kept[0].numbers} if kept else {},
            None if notes is None else np.frombuffer(b"".join(notes), np.uint8),
            None if notes is None else np.cumsum([0, *map(len, notes)], dtype=np.int64),
        )

    @staticmethod
    def joined(name: str, parts: "list[Rows]") -> "Rows":
        """Several pieces of one source as one."""
        parts = [part for part in parts if len(part)] or [Rows.of(name, [])]
        first = parts[0]
        lengths = np.concatenate([np.diff(part.starts) for part in parts])
        return Rows(
            name,
            np.concatenate([part.ids for part in parts]),
            np.concatenate([part.learned for part in parts]),
            np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
            first.parts,
            np.concatenate([part.labels for part in parts]) if first.labels is not None else None,
            {key: np.concatenate([part.numbers[key] for part in parts]) for key in first.numbers},
            *_joined_notes(parts),
        )

    def __len__(self) -> int:
        return (len(self.starts) - 1) // self.parts

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 (R,): tokens of each row, all its sequences together."""
        return np.diff(self.starts[:: self.parts])

    def note(self, row: int) -> str:
        """What was kept of a row as it was."""
        if self.notes is None or self.note_starts is None:
            return ""
        return self.notes[self.note_starts[row] : self.note_starts[row + 1]].tobytes().decode()

    @property
    def learned_tokens(self) -> int:
        """Tokens that carry a label."""
        return int(self.learned.sum())


def _joined_notes(parts: list[Rows]) -> tuple[np.ndarray | None, np.ndarray | None]:
    if parts[0].notes is None:
        return None, None
    lengths = np.concatenate([np.diff(part.note_starts) for part in parts if part.note_starts is not None])
    notes = np.concatenate([part.notes for part in parts if part.notes is not None])
    return notes, np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])


def _numbers(values: list[Any]) -> np.ndarray:
    """float32, or int64 where all of them are whole."""
    made = np.array(values)
    return made.astype(np.int64 if made.dtype.kind in "iub" else np.float32)


@dataclass(frozen=True)
class Sequence:
    """What the model sees at once: one sequence of a row, or several packed rows. L tokens."""

    input_ids: np.ndarray
    """int32 (L,)"""
    labels: np.ndarray
    """int32 (L,): what is learned there (the token itself, or its tag), else -100; not shifted. Of a language model's
    rows the first never is."""
    position_ids: np.ndarray
    """int32 (L,): from 0 at the start of every row."""
    packed: bool = False
    tasks: np.ndarray | None = None
    """int32 (L,): number of each token's task, where the method knows tasks."""

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Item:
    """One place of an epoch: a row, or a pack of rows of one sequence each."""

    sequences: tuple[Sequence, ...]
    rows: tuple[tuple[int, int], ...]
    """(source, row) of every row in it."""
    numbers: Mapping[str, np.ndarray] = field(default_factory=dict)
    """() or (k,) by name; a pack has none."""
    note: str = ""
    """What was kept of the row as it was; a pack has none."""

    def __len__(self) -> int:
        """Tokens."""
        return sum(len(sequence) for sequence in self.sequences)


_PIECE = 2**20  # tokens looked at together


class Stream:
    """The items of a run, epoch by epoch.

    ``weights``: how often a source's rows come in one epoch; of 0.5, epochs 0 and 1 together show every row once.
    ``shuffle=False``: rows in the order of the files (evaluation).
    """

    def __init__(
        self,
        rows: list[Rows],
        weights: list[float],
        seed: int,
        packing: bool,
        max_length: int,
        shuffle: bool = True,
    ) -> None:
        self.rows, self.weights, self.seed = rows, weights, seed
        self.packing, self.max_length, self.shuffle = packing, max_length, shuffle
        self._plans: OrderedDict[int, _Plan] = OrderedDict()
        self._sizes: list[int] = []

    def items(self, epoch: int) -> int:
        """Number of items in an epoch; with packing it differs from epoch to epoch by a few."""
        if not self.packing:
            return sum(self._share(source) for source in range(len(self.rows)))
        while len(self._sizes) <= epoch:
            self._sizes.append(len(self._plan(len(self._sizes)).bounds) - 1)
        return self._sizes[epoch]

    def item(self, epoch: int, index: int) -> Item:
        """The item at a place of an epoch. IndexError where ``index`` is not below ``items(epoch)``."""
        plan = self._plan(epoch)
        if not 0 <= index < len(plan.bounds) - 1:
            raise IndexError(f"epoch {epoch} has {len(plan.bounds) - 1} items, there is no {index}")
        first, last = plan.bounds[index], plan.bounds[index + 1]
        places = tuple((int(s), int(r)) for s, r in zip(plan.sources[first:last], plan.rows[first:last], strict=True))
        return self._assemble(places)

    def holds(self, tokens: list[int]) -> bool:
        """Whether these tokens stand anywhere in the rows, one after the other. Of none: they do."""
        wanted = np.array(tokens, np.int32)
        for rows in self.rows if tokens else []:
            for begin in range(0, len(rows.ids), _PIECE):  # of a large source little is in memory
                piece = rows.ids[begin : begin + _PIECE + len(wanted) - 1]
                for start in np.flatnonzero(piece == wanted[0]):
                    if np.array_equal(piece[start : start + len(wanted)], wanted):
                        return True
        return not tokens

    def locate(self, position: int) -> tuple[int, int]:
        """(epoch, index) of the item at a position counted over all epochs from 0."""
        if not self.packing:
            return divmod(position, self.items(0))
        epoch = 0
        while position >= (size := self.items(epoch)):
            position -= size
            epoch += 1
        return epoch, position

    def used(self, end: int) -> list[np.ndarray]:
        """By source the rows, ascending, that come before a position counted over all epochs."""
        epoch, index = self.locate(max(end - 1, 0))
        seen: list[set[int]] = [set() for _ in self.rows]
        for number in range(epoch + 1):
            plan = self._plan(number)
            last = plan.bounds[index + 1] if number == epoch else len(plan.rows)
            for source, found in enumerate(seen):
                found.update(plan.rows[:last][plan.sources[:last] == source].tolist())
            if all(len(found) == len(rows) for found, rows in zip(seen, self.rows, strict=True)):
                break
        return [np.array(sorted(found), np.int64) for found in seen]

    def add_numbers(self, name: str, values: list[np.ndarray]) -> None:
        """A further number of every row, (R,) or (R, k) by source."""
        self.rows = [
            replace(rows, numbers=rows.numbers | {name: more}) for rows, more in zip(self.rows, values, strict=True)
        ]

    def tokens(self, epoch: int) -> int:
        """Tokens of all rows of an epoch."""
        plan = self._plan(epoch)
        return int(sum(self.rows[s].lengths[plan.rows[plan.sources == s]].sum() for s in range(len(self.rows))))

    def _assemble(self, places: tuple[tuple[int, int], ...]) -> Item:
        if self.packing:
            packed = [self._sequence(self.rows[source], row, row) for source, row in places]
            tasks = [part.tasks for part in packed if part.tasks is not None]
            whole = Sequence(
                np.concatenate([part.input_ids for part in packed]),
                np.concatenate([part.labels for part in packed]),
                np.concatenate([part.position_ids for part in packed]),
                True,
                np.concatenate(tasks) if tasks else None,
            )
            return Item((whole,), places)
        [(source, row)] = places
        rows = self.rows[source]
        first = row * rows.parts
        return Item(
            tuple(self._sequence(rows, row, first + part) for part in range(rows.parts)),
            places,
            {key: values[row] for key, values in rows.numbers.items()},
            rows.note(row),
        )

    def _sequence(self, rows: Rows, row: int, number: int) -> Sequence:
        start, end = rows.starts[number], rows.starts[number + 1]
        ids = rows.ids[start:end]
        said = ids if rows.labels is None else rows.labels[start:end]
        labels = np.where(rows.learned[start:end], said, IGNORED).astype(np.int32)
        if rows.labels is None:
            labels[:1] = IGNORED  # it would be predicted from the row before it
        tasks = rows.numbers.get("task")
        return Sequence(
            ids,
            labels,
            np.arange(end - start, dtype=np.int32),
            tasks=None if tasks is None else np.full(end - start, tasks[row], np.int32),
        )

    def _share(self, source: int) -> int:
        """Rows of a source in one epoch."""
        size = len(self.rows[source])
        return max(1, round(size * self.weights[source])) if size else 0

    def _plan(self, epoch: int) -> "_Plan":
        plan = self._plans.get(epoch)
        if plan is None:
            plan = self._make_plan(epoch)
            self._plans[epoch] = plan
            if len(self._plans) > _KEPT_EPOCHS:
                self._plans.popitem(last=False)
        return plan

    def _make_plan(self, epoch: int) -> "_Plan":
        picked = [self._pick(source, epoch) for source in range(len(self.rows))]
        sources = np.repeat(np.arange(len(picked)), [len(part) for part in picked])
        rows = np.concatenate(picked) if picked else np.zeros(0, np.int64)
        if self.shuffle:
            order = permutation(len(rows), self.seed, 0, epoch)
            sources, rows = sources[order], rows[order]
        if not self.packing:
            return _Plan(sources, rows, np.arange(len(rows) + 1))
        lengths = np.empty(len(rows), np.int64)
        for source, part in enumerate(self.rows):
            chosen = sources == source
            lengths[chosen] = part.lengths[rows[chosen]]
        packs = pack(lengths, self.max_length)
        if self.shuffle:  # a window's fullest packs come first otherwise
            packs = [packs[number] for number in permutation(len(packs), self.seed, 1, epoch)]
        order = np.array([number for members in packs for number in members], dtype=np.int64)
        bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum([len(members) for members in packs])]).astype(
            np.int64
        )
        return _Plan(sources[order], rows[order], bounds)

    def _pick(self, source: int, epoch: int) -> np.ndarray:
        """The rows of a source in an epoch: the next ones of an endless chain of shuffled passes over it."""
        size, share = len(self.rows[source]), self._share(source)
        if not size:
            return np.zeros(0, np.int64)
        if not self.shuffle:
            return np.arange(share, dtype=np.int64) % size
        first, parts = epoch * share, []
        while share:
            turn, offset = divmod(first, size)
            part = permutation(size, self.seed, 2 + source, turn)[offset : offset + share]
            parts.append(part)
            first, share = first + len(part), share - len(part)
        return np.concatenate(parts)


@dataclass(frozen=True)
class _Plan:
    """One epoch: sequence i holds the rows (sources[k], rows[k]) for k from bounds[i] to bounds[i + 1]."""

    sources: np.ndarray
    rows: np.ndarray
    bounds: np.ndarray


def permutation(size: int, *key: int) -> np.ndarray:
    """int64 (size,): an order of 0 … size-1 that depends on ``key`` and on nothing else.

    Numbers are sorted by SplitMix64 of (key, number); numpy's generators may change between versions.
    """
    state = np.uint64(0x9E3779B97F4A7C15)
    for part in key:
        state = _mix(state ^ _mix(np.uint64(part)))
    return np.argsort(_mix(np.arange(size, dtype=np.uint64) + state), kind="stable")


def _mix(value: Any) -> Any:
    """The output function of SplitMix64 (Steele, Lea, Flood 2014), on one number or an array."""
    with np.errstate(over="ignore"):
        value = value + np.uint64(0x9E3779B97F4A7C15)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return value ^ (value >> np.uint64(31))


def pack(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Fill packs of ``capacity`` tokens with whole rows: best fit of the longest first, window by window.

    ``lengths``: int (R,), none above ``capacity``. Returns the row numbers of every pack.
    """
    packs: list[list[int]] = []
    for begin in range(0, len(lengths), _WINDOW):
        window = lengths[begin : begin + _WINDOW]
        free: list[tuple[int, int]] = []  # (room, pack), by room
        for offset in np.argsort(-window, kind="stable").tolist():
            length = int(window[offset])
            found = bisect_left(free, (length, -1))  # the tightest pack it fits into
            if found == len(free):
                room, number = capacity, len(packs)
                packs.append([])
            else:
                room, number = free.pop(found)
            packs[number].append(begin + offset)
            if room > length:
                insort(free, (room - length, number))
    return packs


def collate(items: list[Item], pad_token_id: int, multiple_of: int = 8) -> dict[str, Any]:
    """B items of P sequences each as one batch of int64 tensors (P x B, L), L the longest rounded up to
    ``multiple_of``: first the first sequences of all items, then the second ones.

    ``input_ids``, ``labels``, ``position_ids``; ``attention_mask`` unless the sequences are packed: then the model
    finds the rows by their positions, and padding is a row of its own (its positions start at 0 again). Padding is on
    the right, without labels. ``num_tokens`` is an int, tokens that are not padding, ``items`` is B. ``tasks``, the
    number of each token's task, where the method knows tasks. Numbers come under their names, (B,) or (B, k).
    """
    sequences = [item.sequences[part] for part in range(len(items[0].sequences)) for item in items]
    length = math.ceil(max(len(sequence) for sequence in sequences) / multiple_of) * multiple_of
    packed = any(sequence.packed for sequence in sequences)
    shape = (len(sequences), length)
    ids, labels = np.full(shape, pad_token_id, np.int64), np.full(shape, IGNORED, np.int64)
    positions, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for number, sequence in enumerate(sequences):
        size = len(sequence)
        ids[number, :size], labels[number, :size] = sequence.input_ids, sequence.labels
        positions[number, :size], mask[number, :size] = sequence.position_ids, 1
        positions[number, size:] = np.arange(length - size)
    batch: dict[str, Any] = {
        "input_ids": torch.from_numpy(ids),
        "labels": torch.from_numpy(labels),
        "position_ids": torch.from_numpy(positions),
        "num_tokens": int(mask.sum()),
        "items": len(items),
    }
    if not packed:
        batch["attention_mask"] = torch.from_numpy(mask)
    if any(sequence.tasks is not None for sequence in sequences):
        batch["tasks"] = torch.zeros(shape, dtype=torch.int64)
        for number, sequence in enumerate(sequences):
            batch["tasks"][number, : len(sequence)] = torch.from_numpy(sequence.tasks)
    for key in items[0].numbers:
        if key != "task":
            batch[key] = torch.from_numpy(np.stack([item.numbers[key] for item in items]))
    return batch
