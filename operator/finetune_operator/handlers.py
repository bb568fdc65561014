"""The edge to Kubernetes: kopf delivers events, a work queue calls ``reconcile``, a web server answers probes.

``main`` is called by ``finetune operator``. Nothing here decides about jobs. Only kopf's ``on.event`` is used: it
needs no finalizer (``kubectl delete`` never hangs) and leaves no annotation on the user's object (no GitOps drift).
"""

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import kopf
from aiohttp import web
from kopf._cogs.clients import errors as kopf_errors  # why it ended, and
from kopf._cogs.structs import references as kopf_references  # what it watches, is told nowhere else
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from finetune_api.base import seconds
from finetune_operator import manifests
from finetune_operator.cluster import ClusterError, Object
from finetune_operator.cluster.kubernetes import KubernetesCluster, load_client
from finetune_operator.lease import elect, identity
from finetune_operator.metrics import OperatorMetrics
from finetune_operator.queue import WorkQueue
from finetune_operator.reconcile import Result, reconcile
from finetune_operator.settings import Settings

log = logging.getLogger(__name__)

Key = tuple[str, str]
"""Namespace and name of a FineTuneJob."""


LOOK_AGAIN, LOOK_WHILE_WATCHING = 2.0, 5.0
"""Seconds between two looks whether FineTuneJobs are served."""
NOT_SERVED = (
    f"The API server does not serve {manifests.PLURAL}.{manifests.GROUP} {manifests.VERSION}, or not yet: install the "
    "CustomResourceDefinition (the chart does, unless crds.enabled is false). Nothing is done until then."
)


class Operator:
    """What lives as long as the process: the queue, the jobs last seen, the metrics."""

    def __init__(self, settings: Settings, cluster: KubernetesCluster) -> None:
        self.settings = settings
        self.cluster = cluster
        self.queue: WorkQueue[Key] = WorkQueue()
        self.jobs: dict[Key, Object] = {}
        self.metrics = OperatorMetrics(lambda: list(self.jobs.values()), settings)
        self._told: dict[Key, str] = {}
        """The states of jobs, as those that wait for them know them."""
        self.leading = asyncio.Event()
        self.give_back: Callable[[], None] = lambda: None
        self._stop_watches = threading.Event()
        self.watching: kopf_references.Insights | None = None
        """What kopf has found of the API, while it runs."""

    # --- what wakes us ---

    def seen(self, body: Object, deleted: bool) -> None:
        """A FineTuneJob changed."""
        key = (body["metadata"]["namespace"], body["metadata"]["name"])
        before = self.jobs.pop(key, None)
        if not deleted:
            self.jobs[key] = body
        # Every pass that writes a status is told of here, too: it must not be the cause of the next one.
        if deleted or before is None or _asked(before) != _asked(body):
            self.queue.add(key)
        known, state = self._told.pop(key, None), None
        if not deleted:
            state = self._told[key] = (body.get("status") or {}).get("state", "")
        if state != known:
            for other, job in self.jobs.items():
                if other[0] == key[0] and other != key and _names(job.get("spec"), f"job://{key[1]}"):
                    self.queue.add(other)

    def watch_pods(self) -> None:
        """Threads that turn changes of worker pods into keys."""
        loop = asyncio.get_running_loop()

        def run(namespace: str | None) -> None:
            for key in self.cluster.watch_pods(namespace, self._stop_watches):
                loop.call_soon_threadsafe(self.queue.add, key)

        everywhere: list[str | None] = [None]
        for namespace in self.settings.namespaces or everywhere:
            threading.Thread(target=run, args=(namespace,), name=f"pods-{namespace}", daemon=True).start()

    async def resync(self) -> None:
        """Every job now and then, without cause: no event is ever the only chance."""
        while True:
            await asyncio.sleep(seconds(self.settings.resync_interval))
            for key in list(self.jobs):
                self.queue.add(key)

    def is_watching(self) -> bool:
        """FineTuneJobs are served, and kopf watches them."""
        found = self.watching
        return found is not None and bool(found.watched_resources and found.namespaces)

    async def watch_jobs(self) -> None:
        """FineTuneJobs, by kopf, until SIGTERM or SIGINT.

        kopf looks for the resource once, when it starts; watches nothing if it is not there; and ends when it goes. So
        it is started when the API server serves the resource, and anew when that was deleted and came back.
        """
        stopped = asyncio.Event()
        while True:
            _on_signals(stopped)
            if not await self._served(stopped):
                return
            ready, gone = asyncio.Event(), asyncio.Event()
            looks = asyncio.create_task(self._until_gone(ready, gone, stopped))
            self.watching = kopf_references.Insights()
            try:
                await kopf.operator(
                    registry=_registry(self),
                    settings=_kopf_settings(),
                    standalone=True,
                    identity=identity(),  # type: ignore[arg-type]  # else kopf asks for the user's name: 65532 has none
                    clusterwide=not self.settings.namespaces,
                    namespaces=self.settings.namespaces,
                    insights=self.watching,
                    ready_flag=ready,
                    stop_flag=gone,
                )
            except kopf_errors.APINotFoundError:
                pass  # gone, and perhaps back already
            else:
                if stopped.is_set() or not gone.is_set():
                    return
            finally:
                looks.cancel()
                self.watching = None
            log.warning("%s", NOT_SERVED)
            for key in list(self.jobs):
                self.seen(self.jobs[key], deleted=True)

    async def _served(self, stopped: asyncio.Event) -> bool:
        """Waits until the resource is served. False: told to stop before that."""
        told = False
        while not await self._is_served():
            if not told:
                log.warning("%s", NOT_SERVED)
            told = True
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stopped.wait(), LOOK_AGAIN)
            if stopped.is_set():
                return False
        return True

    async def _until_gone(self, ready: asyncio.Event, gone: asyncio.Event, stopped: asyncio.Event) -> None:
        """Sets ``gone`` when the resource is not served any more, or kopf has missed it (API servers do not learn of it
        at the same moment); and with ``stopped``."""
        await ready.wait()
        # kopf has taken the signals over by now, and does not give them back: one that comes while it ends is lost.
        _on_signals(stopped, gone)
        while True:
            await asyncio.sleep(LOOK_WHILE_WATCHING)
            found = self.watching
            missed = found is not None and found.ready_resources.is_set() and not found.watched_resources
            if missed or not await self._is_served():
                gone.set()
                return

    async def _is_served(self) -> bool:
        try:
            return await asyncio.to_thread(self.cluster.serves_finetunejobs)
        except ClusterError as error:
            log.warning("%s", error.message)
            return self.is_watching()  # nothing is known: it stays as it is

    # --- work ---

    async def work(self) -> None:
        """One worker. Waits for leadership, then takes keys for ever."""
        await self.leading.wait()
        self.metrics.leader.set(1)
        while True:
            key = await self.queue.get()
            self.metrics.queue_depth.set(len(self.queue))
            await self._pass(key)

    async def _pass(self, key: Key) -> None:
        started = time.monotonic()
        before = self.jobs.get(key)
        try:
            result = await asyncio.to_thread(reconcile, self.cluster, self.settings, *key)
        except ClusterError as error:
            log.warning("%s/%s: %s", *key, error.message)
            self._failed(key, started)
        except Exception:
            log.exception("%s/%s: the pass broke", *key)
            self._failed(key, started)
        else:
            self._remember(key, before, result)
            self.metrics.reconcile_seconds.labels("ok").observe(time.monotonic() - started)
            self.queue.done(key, result.requeue)

    def _failed(self, key: Key, started: float) -> None:
        self.metrics.reconcile_errors.inc()
        self.metrics.reconcile_seconds.labels("error").observe(time.monotonic() - started)
        self.queue.failed(key)

    def _remember(self, key: Key, before: Object | None, result: Result) -> None:
        if result.job is None:
            self.jobs.pop(key, None)
            return
        self.jobs[key] = result.job
        ended = {a["number"] for a in ((before or {}).get("status") or {}).get("attempts", []) if a.get("endTime")}
        for attempt in result.job["status"].get("attempts", []):
            good = attempt.get("cause") in ("Succeeded", "Suspended", None, "")
            if before is not None and attempt.get("endTime") and not good and attempt["number"] not in ended:
                self.metrics.attempt_failures.labels(*key, attempt["cause"]).inc()

    # --- probes and metrics ---

    async def serve(self) -> web.AppRunner:
        """/metrics, /healthz and /readyz. They answer from the event loop: a stuck loop fails its probe."""

        async def metrics(_: web.Request) -> web.Response:
            self.metrics.queue_depth.set(len(self.queue))
            body = generate_latest(self.metrics.registry)
            return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

        async def healthz(_: web.Request) -> web.Response:
            return web.Response(text="ok\n")

        async def readyz(_: web.Request) -> web.Response:
            if self.is_watching():
                return web.Response(text="ok\n")
            return web.Response(status=503, text=f"{NOT_SERVED}\n")

        app = web.Application()
        app.router.add_get("/metrics", metrics)
        app.router.add_get("/healthz", healthz)
        app.router.add_get("/readyz", readyz)
        # kopf waits 5 s for whatever is left when it stops, open connections too, and the next replica waits for us.
        runner = web.AppRunner(app, access_log=None, keepalive_timeout=0)
        await runner.setup()
        await web.TCPSite(runner, port=self.settings.http_port).start()
        return runner

    def lost_leadership(self) -> None:
        """Stop this instant, in the middle of anything: another replica may be at work already."""
        log.error("leadership lost; this replica stops")
        logging.shutdown()
        os._exit(1)

    async def run(self) -> None:
        """Until SIGTERM or SIGINT."""
        runner = await self.serve()
        self.give_back = elect(self.settings.leader_election, self.leading, self.lost_leadership)
        self.watch_pods()
        tasks = [asyncio.create_task(self.work()) for _ in range(self.settings.workers)]
        tasks.append(asyncio.create_task(self.resync()))
        try:
            await self.watch_jobs()
        finally:
            self._stop_watches.set()
            for task in tasks:
                task.cancel()
            await runner.cleanup()


def _on_signals(*flags: asyncio.Event) -> None:
    """SIGTERM and SIGINT set these flags."""

    def told() -> None:
        for flag in flags:
            flag.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, told)


def _registry(operator: Operator) -> kopf.OperatorRegistry:
    registry = kopf.OperatorRegistry()

    @kopf.on.login(registry=registry)
    def login(**kwargs: Any) -> Any:
        # in the cluster the service account, whose token changes; outside it KUBECONFIG
        return kopf.login_with_service_account(**kwargs) or kopf.login_with_kubeconfig(**kwargs)

    @kopf.on.event(manifests.GROUP, manifests.VERSION, manifests.PLURAL, registry=registry)
    async def finetunejob(event: Any, **_: Any) -> None:
        operator.seen(dict(event["object"]), event["type"] == "DELETED")

    return registry


def _kopf_settings() -> kopf.OperatorSettings:
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False  # events are written by us, on purpose
    settings.scanning.disabled = True  # needs rights on CRDs and namespaces; Operator.watch_jobs does without
    settings.process.ultimate_exiting_timeout = None  # it may end while the process goes on
    settings.networking.request_timeout = 30
    settings.watching.server_timeout = 300
    settings.watching.client_timeout = 330
    return settings


def _asked(job: Object) -> Object:
    """What others than this operator write of a job."""
    written = ("resourceVersion", "managedFields")
    return {"metadata": {k: v for k, v in job["metadata"].items() if k not in written}, "spec": job.get("spec")}


def _names(part: Any, uri: str) -> bool:
    """A URI stands somewhere in a part of a spec as it was written, valid or not."""
    if isinstance(part, dict):
        return any(_names(value, uri) for value in part.values())
    if isinstance(part, list):
        return any(_names(value, uri) for value in part)
    return bool(part == uri)


class _JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def set_up_logging(settings: Settings) -> None:
    """To standard error, as text or as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    handler.setFormatter(_JsonFormatter() if settings.log_format == "json" else text)
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    # kopf tells of every event it delivers, the election of every renewal; that is debugging
    logging.getLogger("leaderelection").setLevel(logging.WARNING if settings.log_level != "debug" else logging.DEBUG)
    logging.getLogger("kopf.objects").setLevel(logging.WARNING if settings.log_level != "debug" else logging.DEBUG)


def main(settings: Settings) -> None:
    """Run the operator until it is told to stop."""
    set_up_logging(settings)
    api = load_client(connections=settings.workers * 2 + 4)
    cluster = KubernetesCluster(api, settings.progress_through)

    operator = Operator(settings, cluster)
    try:
        asyncio.run(operator.run())  # which waits for passes that are being done
    finally:
        operator.give_back()
    # Threads may be reading a watch: one that wakes while the interpreter is taken down aborts the process.
    logging.shutdown()
    os._exit(0)
