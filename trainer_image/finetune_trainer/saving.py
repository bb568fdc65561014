"""Saving while the training goes on.

At a step boundary every process copies its own ranges of the trainable state into (pinned) host memory; a thread
then writes and uploads them while the next steps run. Rank 0's thread waits for the word of all processes, writes
the manifest, and then cleans up: old checkpoints beyond the limit, and what older attempts left incomplete.
Failures are counted and reported; they end the run only when nothing could be saved for ``GIVE_UP_AFTER`` seconds.

Called by ``run.py`` only. Files carry the number of the writer's claim in their names, so that a fenced-off writer
that still runs can spoil nobody's checkpoint.
"""

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from finetune_api.causes import Cause
from finetune_api.run import CheckpointInfo, TrainerConfig
from finetune_trainer.checkpoint import (
    MANIFEST,
    METRICS,
    RUN,
    File,
    Manifest,
    digest_of,
    folder,
    identity,
    persistently,
    sha256_of,
)
from finetune_trainer.fence import Fence
from finetune_trainer.outcome import RunError
from finetune_trainer.state import TrainableState
from finetune_trainer.storage import Store
from finetune_trainer.world import World

GIVE_UP_AFTER = 1800.0
"""Seconds without one good save, over at least three failed ones, after which the run ends."""
PEER_TIMEOUT = 1800.0
"""Seconds rank 0 waits for another process's part of a checkpoint."""


@dataclass
class Saved:
    """What became of one save, as rank 0 knows it."""

    step: int
    info: CheckpointInfo | None
    """None: it failed."""
    problem: str
    seconds: float
    """From the request until the manifest was written."""


@dataclass
class Snapshot:
    """One process's part of a checkpoint, in host memory."""

    step: int
    position: int
    adam_steps: int
    tensors: dict[str, torch.Tensor]
    """``kind/parameter`` to a flat host tensor."""
    fragments: dict[str, tuple[int, int]]
    parameters: dict[str, tuple[int, ...]]
    documents: dict[str, bytes]
    """``metrics.jsonl`` and ``run.json`` (rank 0)."""
    serial: int
    began: float = field(default_factory=time.monotonic)


class Saver:
    """Writes checkpoints of one run. One save is under way at a time."""

    def __init__(
        self,
        store: Store,
        config: TrainerConfig,
        world: World,
        state: TrainableState,
        *,
        fence: Fence | None,
        inputs: dict[str, str],
        work: Path,
        limit: int,
        kept: list[CheckpointInfo],
        leftovers: Iterable[int] = (),
        on_saved: Callable[[Saved], None] = lambda saved: None,
    ) -> None:
        """``fence`` is rank 0's claim, None elsewhere; ``limit`` checkpoints are kept; ``kept`` are those found at
        the start, oldest first, and ``leftovers`` the steps of the incomplete or broken ones found there;
        ``on_saved`` is called on rank 0 from the saving thread."""
        self.store = store
        self.world = world.clone()
        self.state = state
        self.fence = fence
        self.inputs = inputs
        self.work = work
        self.limit = limit
        self.kept = list(kept)
        self.on_saved = on_saved
        self.identity = identity(config)
        self.global_batch_size = config.global_batch_size
        self.best = 0
        """Step of the checkpoint that is kept beside the newest ones; 0: none."""
        self.failures = 0
        self.last_problem = ""
        self.fatal: RunError | None = None
        self.saved_step = kept[-1].step if kept else 0
        self._run = fence.run if fence else ""
        self._attempt = fence.attempt if fence else 0
        self._claim = int(self.world.share("saving/claim", fence.number if fence else 0))
        self._buffers: dict[str, torch.Tensor] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="saving")
        self._pending: Future[None] | None = None
        self._serial = 0
        self._good_at = time.monotonic()
        self._failed_since_good = 0
        self.leftovers = list(leftovers)
        self._hurry = threading.Event()

    def save(self, step: int, position: int, documents: dict[str, bytes]) -> float:
        """Begin to save the state as it is after ``step``. All processes call this at the same step.

        Returns once the state is copied, with the seconds that took (waiting for the former save included).
        """
        began = time.monotonic()
        self.wait()
        self._serial += 1
        snapshot = self._copy(step, position, documents)
        self._pending = self._pool.submit(self._write, snapshot)
        return time.monotonic() - began

    @property
    def busy(self) -> bool:
        """A save is still being written."""
        return self._pending is not None and not self._pending.done()

    def wait(self, hurry: bool = False) -> None:
        """Until the save under way has ended, well or not. ``hurry``: fewer retries, the pod is about to go."""
        if hurry:
            self._hurry.set()
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def _copy(self, step: int, position: int, documents: dict[str, bytes]) -> Snapshot:
        tensors: dict[str, torch.Tensor] = {}
        fragments: dict[str, tuple[int, int]] = {}
        parameters: dict[str, tuple[int, ...]] = {}
        on_gpu = False
        for fragment in self.state.fragments():
            if not fragment.owned:
                continue
            fragments[fragment.name] = (fragment.start, fragment.stop)
            parameters[fragment.name] = fragment.shape
            for kind, live in fragment.tensors.items():
                key = f"{kind}/{fragment.name}"
                buffer = self._buffers.get(key)
                if buffer is None or buffer.shape != live.shape or buffer.dtype != live.dtype:
                    buffer = torch.empty(live.shape, dtype=live.dtype, pin_memory=live.is_cuda)
                    self._buffers[key] = buffer
                buffer.copy_(live, non_blocking=True)
                on_gpu |= live.is_cuda
                tensors[key] = buffer
        if on_gpu:
            torch.cuda.synchronize()
        return Snapshot(
            step, position, self.state.steps_taken(), tensors, fragments, parameters, documents, self._serial
        )

    # From here on: the saving thread.

    def _write(self, snapshot: Snapshot) -> None:
        word: dict[str, Any]
        try:
            if self.fence is not None:
                persistently(self.fence.check, self._tries)
            word = self._upload(snapshot)
        except Exception as error:
            word = {"problem": f"{type(error).__name__}: {error}"}
            if isinstance(error, RunError):
                word = {"problem": error.message}
                if error.cause is Cause.FENCED:
                    self.fatal = error
        key = f"finetune/save/{self._claim}/{snapshot.serial}"
        if not self.world.first:
            self.world.say(f"{key}/{self.world.rank}", word)
            return
        try:
            words = [word]
            for peer in range(1, self.world.size):
                words.append(self.world.hear(f"{key}/{peer}", PEER_TIMEOUT))
                self.world.store.delete_key(f"{key}/{peer}")
            problems = [f"rank {rank}: {said['problem']}" for rank, said in enumerate(words) if "problem" in said]
            info = None
            if not problems:
                info = self._complete(snapshot, words)
        except Exception as error:
            info, problems = None, [error.message if isinstance(error, RunError) else f"{error}"]
            if isinstance(error, RunError) and error.cause is Cause.FENCED:
                self.fatal = error
        self._conclude(snapshot, info, "; ".join(problems))

    @property
    def _tries(self) -> int:
        return 2 if self._hurry.is_set() else 5

    def _upload(self, snapshot: Snapshot) -> dict[str, Any]:
        """Write this process's file; what rank 0 must know of it."""
        if not snapshot.tensors:
            return {"files": {}, "parameters": {}}
        from safetensors.torch import save_file

        name = f"{self._claim:06d}-{self.world.rank:05d}.safetensors"
        local = self.work / "saving" / name
        local.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file(snapshot.tensors, local)
            file = File(size=local.stat().st_size, sha256=sha256_of(local), fragments=snapshot.fragments)
            persistently(lambda: self.store.put(f"{folder(snapshot.step)}/{name}", local), self._tries)
        finally:
            local.unlink(missing_ok=True)
        return {"files": {name: file.model_dump(mode="json")}, "parameters": snapshot.parameters}

    def _complete(self, snapshot: Snapshot, words: list[dict[str, Any]]) -> CheckpointInfo:
        """Rank 0: the small documents and then the manifest, which makes it a checkpoint."""
        import hashlib

        files: dict[str, File] = {}
        parameters: dict[str, Any] = {}
        for word in words:
            files |= {name: File.model_validate(file) for name, file in word["files"].items()}
            parameters |= word["parameters"]
        where = folder(snapshot.step)
        for name in (METRICS, RUN):
            content = snapshot.documents.get(name)
            if content is None:
                continue
            persistently(lambda n=name, c=content: self.store.put(f"{where}/{n}", c), self._tries)  # type: ignore[misc]
            files[name] = File(size=len(content), sha256=hashlib.sha256(content).hexdigest())
        manifest = Manifest(
            step=snapshot.step,
            position=snapshot.position,
            adam_steps=snapshot.adam_steps,
            time=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
            attempt=self._attempt,
            run=self._run,
            world_size=self.world.size,
            global_batch_size=self.global_batch_size,
            identity=self.identity,
            digest=digest_of(self.identity),
            inputs=self.inputs,
            parameters=parameters,
            files=files,
        )
        content = manifest.sealed()
        if self.fence is not None:
            persistently(self.fence.check, self._tries)
        persistently(lambda: self.store.put(f"{where}/{MANIFEST}", content), self._tries)
        return Manifest.opened(content).info(self.store, content)

    def _conclude(self, snapshot: Snapshot, info: CheckpointInfo | None, problem: str) -> None:
        if info is not None:
            self.kept = [old for old in self.kept if old.step != info.step] + [info]
            self.saved_step = info.step
            self._good_at = time.monotonic()
            self._failed_since_good = 0
            if not self._hurry.is_set():
                try:
                    self._sweep(info)
                except RunError as error:  # what is left over is swept after the next save
                    problem = f"cleaning up: {error.message}"
        else:
            self.failures += 1
            self._failed_since_good += 1
            self.last_problem = problem
            silent = time.monotonic() - self._good_at
            if self.fatal is None and self._failed_since_good >= 3 and silent > GIVE_UP_AFTER:
                self.fatal = RunError(
                    Cause.STORAGE_UNAVAILABLE,
                    f"No checkpoint could be saved for {silent / 60:.0f} minutes "
                    f"({self._failed_since_good} tries). The last one: {problem}",
                )
        self.on_saved(Saved(snapshot.step, info, problem, time.monotonic() - snapshot.began))

    def _sweep(self, newest: CheckpointInfo) -> None:
        """Delete what is beyond the limit, and once what older attempts left incomplete or broken.

        Only after a good save, so that the newest valid checkpoint is never the one deleted. A checkpoint loses
        its manifest first: half deleted, it does not exist.
        """
        if self.fence is not None:
            self.fence.check()
        keep = {info.step for info in self.kept[-self.limit :]} | {newest.step, self.best}
        doomed = {info.step for info in self.kept} - keep
        for step in sorted(doomed):
            self.store.delete(f"{folder(step)}/{MANIFEST}")
            self.store.delete(folder(step))
        # Another process may be writing into the same folders again by now: its files carry our claim.
        mine = f"{self._claim:06d}-"
        for step in self.leftovers:
            for entry in self.store.list(folder(step)):
                if step not in keep and not entry.path.rpartition("/")[2].startswith(mine):
                    self.store.delete(entry.path)
        if newest.step in self.leftovers:
            manifest = Manifest.opened(self.store.get(f"{folder(newest.step)}/{MANIFEST}"))
            for entry in self.store.list(folder(newest.step)):
                if entry.path.rpartition("/")[2] not in (*manifest.files, MANIFEST):
                    self.store.delete(entry.path)
        self.leftovers = []
        self.kept = [info for info in self.kept if info.step in keep]
