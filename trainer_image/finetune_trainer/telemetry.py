"""Where the run stands, for people, for Prometheus and for the operator.

Rank 0 serves ``/metrics``, ``/progress`` (a :class:`Progress`) and ``/healthz`` from the first moment on, before
torch is even imported. Every rank beats: a counter that its training loop raises is carried to rank 0 by a thread of
its own through torch.distributed's store, so that a rank that hangs grows old without any work in the training
stream. Nothing here ends a run: a port that is taken, say, is reported and lived with.

Called by ``run.py``; filled by whoever has the numbers.
"""

import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from finetune_api.run import ENV_ATTEMPT, ENV_HTTP_PORT, HTTP_PORT, CheckpointInfo, Progress, TrainerConfig

BEAT_SECONDS = 1.0
"""How often a rank's pulse is carried to rank 0."""

SILENCE = float(os.environ.get("FINETUNE_SILENCE", "120"))
"""Seconds without any word of a rank after which it counts as lost: a frozen process, a dead node, a cut network.
A rank that merely waits goes on speaking."""

_STEP_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300, 600)


def now() -> str:
    """The time, RFC 3339 in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


@dataclass(frozen=True)
class Value:
    """A gauge that is not there before it has a value: a loss of 0, or a checkpoint of 1970, would set off alerts."""

    gauge: Gauge
    job: str

    def set(self, value: float) -> None:
        """Set it."""
        self.gauge.labels(self.job).set(value)


class Metrics:
    """The Prometheus metrics of a run, every one with the label finetunejob."""

    def __init__(self, job: str) -> None:
        self.registry = CollectorRegistry()
        self._job = job
        self.loss = self._gauge("finetune_train_loss", "Mean loss of the last step, per label token")
        self.learning_rate = self._gauge("finetune_train_learning_rate", "Learning rate of the last step")
        self.grad_norm = self._gauge("finetune_train_grad_norm", "L2 norm of the last gradient before clipping")
        self.step = self._gauge("finetune_train_step", "Optimizer steps done")
        self.max_steps = self._gauge("finetune_train_max_steps", "Optimizer steps in all")
        self.epoch = self._gauge("finetune_train_epoch", "Passes over the training data, with the part of the last one")
        self.tokens = self._counter("finetune_train_tokens", "Useful tokens trained on by this attempt")
        self.tokens_per_second = self._gauge("finetune_train_tokens_per_second", "Useful tokens per second")
        self.mfu = self._gauge("finetune_train_mfu_ratio", "Share of the GPUs' peak used by the model, 0 to 1")
        self.step_seconds = self._histogram("finetune_train_step_seconds", "Duration of a step")
        self.data_wait = self._counter("finetune_train_data_wait_seconds", "Time spent waiting for data")
        self._memory = self._gauges("finetune_train_memory_bytes", "Memory of rank 0", "kind")
        self.checkpoint_seconds = self._gauge("finetune_train_checkpoint_seconds", "Duration of the last save")
        self.checkpoint_time = self._gauge(
            "finetune_train_checkpoint_last_timestamp_seconds", "When the last checkpoint was completed"
        )
        self.checkpoint_failures = self._counter("finetune_train_checkpoint_failures", "Saves that failed")
        self.checkpoint_bytes = self._gauge("finetune_train_checkpoint_bytes", "Size of the last checkpoint")
        self._method = self._gauges("finetune_train_method", "What the method tells about itself", "figure")
        self._figure = self._gauges("finetune_train_figure", "What the stage tells, e.g. its accuracy", "figure")
        self._eval_loss = self._gauges("finetune_eval_loss", "Loss on held-out rows", "source")
        self._eval_perplexity = self._gauges("finetune_eval_perplexity", "Perplexity on held-out rows", "source")
        self._eval_figure = Gauge(
            "finetune_eval_figure",
            "What the stage tells of held-out rows, e.g. its accuracy",
            ["finetunejob", "figure", "source"],
            registry=self.registry,
        )
        self._heartbeat = self._gauges(
            "finetune_train_heartbeat_age_seconds", "Seconds since a rank was last seen to go forward", "rank"
        )
        self._info = Gauge(
            "finetune_train_info",
            "What is trained",
            ["finetunejob", "stage", "method", "model", "world_size"],
            registry=self.registry,
        )

    def memory(self, kind: str, size: float) -> None:
        """``kind``: allocated, peak, reserved (GPU) or rss (host); bytes."""
        self._memory.labels(self._job, kind).set(size)

    def method(self, figure: str, value: float) -> None:
        """A number of the method's own, e.g. AdaLoRA's rank_mean."""
        self._method.labels(self._job, figure).set(value)

    def figure(self, name: str, value: float) -> None:
        """A number of the stage's own, e.g. a reward model's accuracy."""
        self._figure.labels(self._job, name).set(value)

    def evaluation(self, figures: dict[str, float]) -> None:
        """Figures as ``Engine.evaluate`` gives them; the whole is the source ``all``."""
        for name, value in figures.items():
            kind, _, source = name.partition("/")
            gauge = {"loss": self._eval_loss, "perplexity": self._eval_perplexity}.get(kind)
            if gauge is not None:
                gauge.labels(self._job, source or "all").set(value)
            else:
                self._eval_figure.labels(self._job, kind, source or "all").set(value)

    def heartbeat(self, rank: str, age: float) -> None:
        """Seconds since this rank went forward."""
        self._heartbeat.labels(self._job, rank).set(age)

    def info(self, stage: str, method: str, model: str, world_size: int) -> None:
        """What is trained, as labels."""
        self._info.labels(self._job, stage, method, model, str(world_size)).set(1)

    def text(self) -> bytes:
        """Prometheus' exposition format."""
        return generate_latest(self.registry)

    def _gauge(self, name: str, text: str) -> "Value":
        return Value(Gauge(name, text, ["finetunejob"], registry=self.registry), self._job)

    def _gauges(self, name: str, text: str, label: str) -> Gauge:
        return Gauge(name, text, ["finetunejob", label], registry=self.registry)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, ["finetunejob"], registry=self.registry).labels(self._job)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, ["finetunejob"], buckets=_STEP_BUCKETS, registry=self.registry).labels(self._job)


class Telemetry:
    """Progress and metrics of this process; served on rank 0."""

    def __init__(self, config: TrainerConfig, serve: bool) -> None:
        self.metrics = Metrics(config.name)
        self._lock = threading.Lock()
        self._progress = Progress(attempt=int(os.environ.get(ENV_ATTEMPT, "1")))
        self._ages: Callable[[], dict[str, float]] = dict
        self._server: ThreadingHTTPServer | None = None
        self.port = 0
        if serve:
            self._serve(int(os.environ.get(ENV_HTTP_PORT, HTTP_PORT)))

    def update(self, **fields: Any) -> None:
        """Set fields of the progress."""
        with self._lock:
            self._progress = self._progress.model_copy(update=fields)

    def phase(self, phase: str, message: str = "") -> None:
        """What the run is doing now, one of Progress.phase's words; also printed."""
        self.update(phase=phase, message=message or phase)
        if message and self._server is not None:
            print(message, flush=True)

    def progress(self) -> Progress:
        """Where the run stands."""
        ages = self._ages()
        with self._lock:
            return self._progress.model_copy(update={"heartbeats": ages})

    def checkpoints(self, kept: list[CheckpointInfo], failures: int) -> None:
        """The complete checkpoints, oldest first."""
        self.update(checkpoints=list(kept), checkpoint_failures=failures)

    def watch(self, ages: Callable[[], dict[str, float]]) -> None:
        """``ages()`` gives every rank's seconds since it went forward."""
        self._ages = ages

    def close(self) -> None:
        """Stop serving."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def _serve(self, port: int) -> None:
        telemetry = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                if path == "/progress":
                    self._answer(200, "application/json", telemetry.progress().model_dump_json().encode())
                elif path == "/metrics":
                    for rank, age in telemetry._ages().items():
                        telemetry.metrics.heartbeat(rank, age)
                    self._answer(200, CONTENT_TYPE_LATEST, telemetry.metrics.text())
                elif path == "/healthz":
                    self._answer(200, "text/plain", b"ok\n")
                else:
                    self._answer(404, "text/plain", b"try /progress, /metrics or /healthz\n")

            def _answer(self, code: int, kind: str, body: bytes) -> None:
                try:
                    self.send_response(code)
                    self.send_header("Content-Type", kind)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)
                except (BrokenPipeError, ConnectionResetError):
                    pass

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            allow_reuse_address = True
            address_family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET

            def server_bind(self) -> None:
                if self.address_family == socket.AF_INET6:  # for both families
                    self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
                super().server_bind()

        try:
            self._server = Server(("", port), Handler)
        except OSError as error:
            print(f"cannot serve progress on port {port}: {error}; going on without", file=sys.stderr, flush=True)
            return
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.2,), name="http", daemon=True).start()


_GONE = "gone"


class Pulse:
    """Carries each rank's beat count to rank 0, which knows how old each one is, and who has fallen silent.

    The other ranks listen to rank 0, so that its silence is noticed too.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        size: int,
        beats: Callable[[], int],
        lost: Callable[[int, float], None] = lambda rank, seconds: None,
    ) -> None:
        """``store`` is a client for this object's thread alone; ``beats()`` counts this rank's steps forward;
        ``lost(rank, seconds)`` is called from this object's thread, again and again, while a rank is silent so long."""
        self._store = store
        self._rank, self._size = rank, size
        self._beats = beats
        self._lost = lost
        self._turns = 0
        self._turned = time.monotonic()
        self._seen: dict[int, tuple[int, float]] = dict.fromkeys(range(size), (-1, time.monotonic()))
        self._heard: dict[int, tuple[str, float]] = dict.fromkeys(range(size), ("", time.monotonic()))
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self._thread.start()

    def ages(self) -> dict[str, float]:
        """Seconds since each rank was last seen to go forward (rank 0 only)."""
        at = time.monotonic()
        return {str(rank): round(at - seen, 1) for rank, (_, seen) in self._seen.items()}

    def close(self) -> None:
        """Stop: this rank has nothing more to do, and its silence means nothing."""
        self._closed.set()
        self._thread.join(5.0)

    def _run(self) -> None:
        try:
            while not self._closed.wait(BEAT_SECONDS):
                self._turn()
                silent = self._silent()
                if silent is not None and not self._closed.is_set():
                    self._lost(silent, time.monotonic() - self._heard[silent][1])
            self._store.set(f"finetune/pulse/{self._rank}", _GONE)
        except Exception:  # the store's host is gone, and with it the run
            return

    def _turn(self) -> None:
        at = time.monotonic()
        if at - self._turned > 10 * BEAT_SECONDS:  # frozen with all its peers, perhaps: they get their time again
            self._heard = {rank: (word, max(at, heard)) for rank, (word, heard) in self._heard.items()}
        self._turned = at
        self._turns += 1
        self._store.set(f"finetune/pulse/{self._rank}", f"{self._turns} {self._beats()}")
        for rank in range(self._size) if self._rank == 0 else [0]:
            key = f"finetune/pulse/{rank}"
            if not self._store.check([key]):
                continue
            word = self._store.get(key).decode()
            if word == _GONE:
                self._heard[rank] = (word, math.inf)
                continue
            if word != self._heard[rank][0]:
                self._heard[rank] = (word, at)
            count = int(word.split()[1])
            if count != self._seen[rank][0]:
                self._seen[rank] = (count, at)

    def _silent(self) -> int | None:
        """A rank that has not been heard of for too long."""
        at = self._turned
        watched = range(self._size) if self._rank == 0 else [0]
        return next((rank for rank in watched if at - self._heard[rank][1] > SILENCE), None)


class History:
    """``metrics.jsonl``: one JSON line per logged step, kept with every checkpoint so that no step stands twice."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")

    def restore(self, content: bytes, step: int) -> None:
        """Continue after ``step`` with the lines of an earlier attempt."""
        lines = [line for line in content.splitlines() if line.strip() and json.loads(line).get("step", 0) <= step]
        self.path.write_bytes(b"".join(line + b"\n" for line in lines))

    def add(self, record: dict[str, Any]) -> None:
        """Append one line."""
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def content(self) -> bytes:
        """The whole lines; another thread may be writing one."""
        content = self.path.read_bytes()
        return content[: content.rfind(b"\n") + 1]

    def records(self) -> list[dict[str, Any]]:
        """All lines."""
        return [json.loads(line) for line in self.content().splitlines()]


def host_memory() -> int:
    """Resident bytes of this process."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
