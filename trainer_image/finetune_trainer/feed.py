"""The batches of this process, in the order that (seed, epoch, position) gives, prepared while the model works.

A step uses the next ``global_batch_size`` items of the stream, cut into slots of ``per_device_train_batch_size``;
slot s goes to process s mod world. What a slot holds, and its random numbers, depend on the step and the slot only:
any number of processes continues the same stream with the same draws. Where slots do not fill all processes (a ragged
or last batch), the rest get a stand-in whose loss counts nothing, because ZeRO needs every process in every pass.

Called by ``run.py`` and ``engine.py``. One thread reads ahead; errors of the data surface in ``take``.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from finetune_trainer.data import Item, Stream
from finetune_trainer.objectives import Objective

AHEAD = 2
"""Steps prepared in advance."""


@dataclass
class Slot:
    """One forward pass of one process."""

    number: int
    """Within the global batch."""
    batch: dict[str, Any]
    """Collated tensors."""
    stand_in: bool = False
    """Made to keep the other processes company; counts nothing."""


@dataclass
class StepBatch:
    """This process's part of one global batch."""

    step: int
    """Number of the step it is for, from 1."""
    position: int
    """Items used after this step, over all processes."""
    epoch: float
    """After this step: whole and part of an epoch."""
    ends_epoch: bool
    slots: list[Slot]
    weights: list[float]
    """Over how many (label tokens, pairs …) this process's share of each term of the loss is a mean."""
    tokens: int
    """This process's tokens, padding excluded."""
    pairs: int
    """Pairs of tokens that attention looks at: the sum of (position + 1)."""
    rows: list[tuple[int, int]]
    """(source, row) of every row of data that this process sees."""


class Feed:
    """Reads ahead of the training, from ``position`` to ``end``."""

    def __init__(
        self,
        stream: Stream,
        collate: Callable[[list[Item]], dict[str, Any]],
        objective: Objective,
        *,
        rank: int,
        size: int,
        per_device: int,
        global_batch: int,
        first_step: int,
        position: int,
        end: int,
        pin: bool = False,
    ) -> None:
        self.stream = stream
        self.collate = collate
        self.objective = objective
        self.rank, self.size = rank, size
        self.per_device, self.global_batch = per_device, global_batch
        self.first_step, self.position, self.end = first_step, position, end
        self.pin = pin
        self._queue: queue.Queue[StepBatch | BaseException | None] = queue.Queue(AHEAD)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="feed", daemon=True)
        self._thread.start()

    def take(self) -> tuple[StepBatch | None, float]:
        """The next step's batches (None after the last) and the seconds waited for them."""
        began = time.monotonic()
        item = self._queue.get()
        waited = time.monotonic() - began
        if isinstance(item, BaseException):
            raise item
        return item, waited

    def close(self) -> None:
        """Stop reading ahead."""
        self._closed.set()
        while self._thread.is_alive():
            try:
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(0.05)

    def _run(self) -> None:
        try:
            for batch in self._steps():
                self._put(batch)
                if self._closed.is_set():
                    return
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _put(self, item: StepBatch | BaseException | None) -> None:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.2)
                return
            except queue.Full:
                continue

    def _steps(self) -> Iterator[StepBatch]:
        position, step = self.position, self.first_step
        while position < self.end:
            count = min(self.global_batch, self.end - position)
            yield self._step(step, position, count)
            position += count
            step += 1

    def _step(self, step: int, position: int, count: int) -> StepBatch:
        slot_count = -(-count // self.per_device)
        passes = -(-slot_count // self.size)
        result = StepBatch(step, position + count, 0.0, False, [], [0.0] * self.objective.terms, 0, 0, [])
        for turn in range(passes):
            number = turn * self.size + self.rank
            stand_in = number >= slot_count
            first = 0 if stand_in else number * self.per_device
            places = [
                self.stream.locate(position + offset)
                for offset in range(first, 1 if stand_in else min(first + self.per_device, count))
            ]
            items = [self.stream.item(*place) for place in places]
            batch = self.collate(items)
            if not stand_in:
                sequences = [sequence for item in items for sequence in item.sequences]
                result.rows += [row for item in items for row in item.rows]
                weights = self.objective.weights(batch)
                result.weights = [a + b for a, b in zip(result.weights, weights, strict=True)]
                result.tokens += sum(len(sequence) for sequence in sequences)
                result.pairs += sum(int((sequence.position_ids + 1).sum()) for sequence in sequences)
            batch = self.objective.prepare(batch)
            if self.pin:
                batch = {
                    key: value.pin_memory() if isinstance(value, torch.Tensor) else value
                    for key, value in batch.items()
                }
            result.slots.append(Slot(number, batch, stand_in))
        epoch, index = self.stream.locate(position + count - 1)
        length = self.stream.items(epoch)
        result.epoch = epoch + (index + 1) / length
        result.ends_epoch = index + 1 == length or self.stream.locate(position)[0] != epoch
        return result


def draw_seed(seed: int, *place: int) -> int:
    """A 63-bit seed that depends on all of its arguments: (seed, step, slot)."""
    import hashlib

    text = "/".join(str(part) for part in (seed, *place))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1
