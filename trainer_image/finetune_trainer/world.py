"""The processes of a run: who this one is, the device it works on, and small words among them.

Words (JSON) go through torch.distributed's store, not through collectives: they may be said from any thread,
wait as long as a download takes, and never touch the training stream. Called by ``run.py`` and whatever it hands
the :class:`World` to.
"""

import functools
import itertools
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from finetune_api.causes import Cause
from finetune_api.run import MASTER_PORT
from finetune_trainer.outcome import RunError, where_it_runs

if TYPE_CHECKING:
    import torch

COLLECTIVE_TIMEOUT = timedelta(seconds=int(os.environ.get("FINETUNE_COLLECTIVE_TIMEOUT", "300")))
"""How long a collective may wait for a peer. Long work (downloads, answers) never happens inside one."""

ENV_COMPILE = "FINETUNE_COMPILE"
"""auto: decoder layers are compiled where that is known to be safe. 1: always. 0: never."""


def rank() -> int:
    """Number of this process, 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Number of this process on its node."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@dataclass
class World:
    """This process among its peers."""

    rank: int
    local_rank: int
    size: int
    device: "torch.device"
    store: Any
    """A client of the run's store, for this thread only (:meth:`clone` for another one)."""
    alive: Callable[[], None] = lambda: None
    """Called while waiting for a peer's word."""
    _names: dict[str, "itertools.count[int]"] = field(default_factory=dict)
    """How often each name was used: every use has a key of its own."""

    @property
    def first(self) -> bool:
        """Rank 0: the one that writes manifests, metrics and the report."""
        return self.rank == 0

    def clone(self) -> "World":
        """The same for use in another thread: a store's client is held while it waits."""
        return World(self.rank, self.local_rank, self.size, self.device, self.store.clone(), _names=self._names)

    def say(self, key: str, value: Any) -> None:
        """Leave a word (JSON) under a key."""
        self.store.set(key, json.dumps(value))

    def heard(self, key: str) -> bool:
        """A word was left under this key."""
        return bool(self.store.check([key]))

    def hear(self, key: str, timeout: float | None = None) -> Any:
        """The word under a key, waited for. TimeoutError after ``timeout`` seconds (None: never)."""
        began = time.monotonic()
        pause = 0.002
        while not self.heard(key):
            if timeout is not None and time.monotonic() - began > timeout:
                raise TimeoutError(f"no word under {key} within {timeout:.0f} s")
            self.alive()
            time.sleep(pause)
            pause = min(pause * 1.5, 0.2)
        return json.loads(self.store.get(key))

    def gather(self, name: str, value: Any) -> list[Any]:
        """Every rank's word, by rank, on every rank. All ranks call this in the same order."""
        if self.size == 1:
            return [value]
        key = self._key(name)
        self.say(f"{key}/{self.rank}", value)
        if self.first:
            words = [self.hear(f"{key}/{peer}") for peer in range(self.size)]
            self.say(f"{key}/all", words)
            return words
        return list(self.hear(f"{key}/all"))

    def share(self, name: str, value: Any) -> Any:
        """Rank 0's word, on every rank."""
        if self.size == 1:
            return value
        key = self._key(name)
        if self.first:
            self.say(key, value)
            return value
        return self.hear(key)

    def barrier(self, name: str) -> None:
        """Wait until every rank is here, however long that takes."""
        self.gather(f"barrier/{name}", None)

    def in_turn(self, name: str, work: Callable[[], Any]) -> Any:
        """``work`` on the first process of every node, then on the others, which find its files in the cache."""
        if self.size == 1:
            return work()
        result = work() if self.local_rank == 0 else None
        self.barrier(name)
        return work() if self.local_rank else result

    def _key(self, name: str) -> str:
        number = next(self._names.setdefault(name, itertools.count()))
        return f"finetune/{name}/{number}"


@functools.cache
def join(accelerator: str) -> World:
    """Start torch.distributed and DeepSpeed's communication for this process, once.

    ``accelerator`` is gpu or cpu. Raises RunError(NO_ACCELERATOR) where a GPU is asked for and none is there.
    Alone (no launcher), the process is a world of one, with its store in memory: no port is opened.
    """
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(MASTER_PORT))
    if accelerator == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # read by deepspeed's import
        # Nothing is compiled on a CPU unasked; bitsandbytes would load the compiler all the same, 1.5 s of every start.
        if os.environ.get(ENV_COMPILE) != "1":
            os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    device = _device(accelerator)
    # DeepSpeed's own groups are made with the module's default, not with what init_process_group was given:
    # without this a partitioned network hangs for 30 minutes (measured).
    distributed_c10d.default_pg_timeout = COLLECTIVE_TIMEOUT
    distributed_c10d.default_pg_nccl_timeout = COLLECTIVE_TIMEOUT
    backend = "nccl" if device.type == "cuda" else "gloo"
    store = _meet()
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("group", store),
        rank=rank(),
        world_size=world_size(),
        timeout=COLLECTIVE_TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )
    import deepspeed

    deepspeed.utils.logger.setLevel("WARNING")
    if accelerator == "cpu":
        # Otherwise compiled with g++ at the first run: 50 s, for shared memory that one process does not need.
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, timeout=COLLECTIVE_TIMEOUT, verbose=False)
    return World(rank(), local_rank(), world_size(), device, dist.PrefixStore("words", store.clone()))


def _meet() -> Any:
    """The store, once every process is there, however long pods take to come: that is the operator's to limit."""
    import torch.distributed as dist

    if world_size() == 1:
        return dist.HashStore()
    store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(days=1)))
    store.add("finetune/here", 1)
    while int(store.add("finetune/here", 0)) < world_size():
        time.sleep(0.05)
    return store


def _device(accelerator: str) -> "torch.device":
    import torch

    if accelerator == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RunError(
            Cause.NO_ACCELERATOR,
            "No GPU was found. Accepted: workers.gpusPerWorker: 0 to train on the CPU"
            + where_it_runs(
                cluster=f", or a node whose driver matches the image's CUDA {torch.version.cuda}. Where the "
                "gpuResource of the profile is empty, the template must claim GPUs for the container trainer "
                "(resources.claims).",
                machine=f" (--cpu), or a driver that matches torch's CUDA {torch.version.cuda}.",
            ),
        )
    if local_rank() >= torch.cuda.device_count():
        raise RunError(
            Cause.NO_ACCELERATOR,
            f"Process {local_rank()} of this pod has no GPU of its own: {torch.cuda.device_count()} were found. "
            "Set workers.gpusPerWorker to the number of GPUs that the pod gets.",
        )
    torch.cuda.set_device(local_rank())
    return torch.device("cuda", local_rank())
