"""The Kubernetes API as a :class:`~finetune_operator.cluster.Cluster`.

Made by ``handlers.py``; called by ``reconcile.py`` from worker threads (the client's connection pool is thread-safe).
Reads plain JSON, not the client's typed models: what is observed must not depend on the client's version. Never
reads Secrets.
"""

import contextlib
import json
import logging
import re
import threading
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Literal

import urllib3
from kubernetes import client, config, watch
from kubernetes.client.exceptions import ApiException

from finetune_api.conditions import Reason
from finetune_api.run import HTTP_PORT
from finetune_operator import manifests
from finetune_operator.cluster import ClusterError, Object, RefusedError, is_same
from finetune_operator.observe import controller_of

log = logging.getLogger(__name__)

FIELD_MANAGER = "finetune-operator"
TIMEOUT = 30
PROGRESS_TIMEOUT = 3
PLAIN = {"Job": "jobs", "PodGroup": "podgroups"}
"""Kinds that are written by :class:`_Plain`, and what they are called in paths."""
LOG_BYTES = 16384
"""Of a log's end, looked at."""
LINE_LENGTH = 400
"""Characters of one of its lines, kept."""


def load_client(connections: int) -> client.ApiClient:
    """A client for the cluster this process runs in, else for the one KUBECONFIG names."""
    try:
        config.load_incluster_config()
    except config.ConfigException:
        config.load_kube_config()
    configuration = client.Configuration.get_default_copy()
    configuration.connection_pool_maxsize = connections
    return client.ApiClient(configuration)


class KubernetesCluster:
    """See :class:`finetune_operator.cluster.Cluster` for what each method does."""

    def __init__(self, api: client.ApiClient, progress_through: Literal["pod", "apiserver"] = "pod") -> None:
        self._core = client.CoreV1Api(api)
        self._batch = client.BatchV1Api(api)
        self._network = client.NetworkingV1Api(api)
        self._custom = client.CustomObjectsApi(api)
        self._apis = client.ApisApi(api)
        self._progress_through = progress_through
        # A pod's address is of this cluster: no proxy that HTTP_PROXY names can reach it.
        self._direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        groups = {"ConfigMap": self._core, "Service": self._core, "Pod": self._core, "Job": self._batch}
        self._groups: Mapping[str, Any] = {**groups, "NetworkPolicy": self._network}

    def serves_finetunejobs(self) -> bool:
        """Whether the API server serves the resource: both what kopf asks, and what it asks after."""
        try:
            groups = self._json("read the API's groups", self._apis.get_api_versions)["groups"]
            here = (manifests.GROUP, manifests.VERSION)
            resources = self._json("read the API's resources", self._custom.get_api_resources, *here)["resources"]
        except _NotFoundError:
            return False
        versions = [v["groupVersion"] for g in groups for v in g["versions"]]
        return manifests.API_VERSION in versions and manifests.PLURAL in [r["name"] for r in resources]

    def finetunejob(self, namespace: str, name: str) -> Object | None:
        try:
            return self._json(
                f"read FineTuneJob {namespace}/{name}",
                self._custom.get_namespaced_custom_object,
                manifests.GROUP,
                manifests.VERSION,
                namespace,
                manifests.PLURAL,
                name,
            )
        except _NotFoundError:
            return None

    def children(self, namespace: str, name: str) -> list[Object]:
        selector = f"{manifests.LABEL_JOB}={name}"
        found: list[Object] = []
        for kind, listing in (
            ("Job", self._batch.list_namespaced_job),
            ("Pod", self._core.list_namespaced_pod),
            ("ConfigMap", self._core.list_namespaced_config_map),
        ):
            found += self._list(kind, listing, namespace, label_selector=selector)
        self._tell_suspended(namespace, selector, found)
        return [*found, *self._refusals(namespace, found)]

    def _list(self, kind: str, listing: Callable[..., Any], namespace: str, **selector: str) -> list[Object]:
        answer = self._json(f"list {kind}s of {namespace}", listing, namespace, **selector)
        return [{**item, "kind": kind} for item in answer.get("items") or []]

    def _tell_suspended(self, namespace: str, selector: str, children: list[Object]) -> None:
        """A queue suspends a Job, and its pods go at once: read a moment before them, it would not tell why."""
        if not any(child["kind"] == "Pod" and "deletionTimestamp" in child["metadata"] for child in children):
            return
        jobs = self._list("Job", self._batch.list_namespaced_job, namespace, label_selector=selector)
        suspended = {job["metadata"]["uid"] for job in jobs if job["spec"].get("suspend")}
        for child in children:
            if child["metadata"]["uid"] in suspended:
                child["spec"]["suspend"] = True

    def _refusals(self, namespace: str, children: list[Object]) -> list[Object]:
        """The events that say why the Job controller cannot make the pods a Job lacks: they are told nowhere else."""
        owners = [owner["uid"] for child in children for owner in child["metadata"].get("ownerReferences") or []]
        found: list[Object] = []
        for job in children:
            uid, over = job["metadata"]["uid"], "deletionTimestamp" in job["metadata"]
            over = over or any(c["status"] == "True" for c in (job.get("status") or {}).get("conditions") or [])
            if job["kind"] != "Job" or over or owners.count(uid) >= job["spec"].get("parallelism", 1):
                continue
            selector = f"involvedObject.uid={uid},reason=FailedCreate"
            with contextlib.suppress(ClusterError):  # a job runs as well without being explained
                found += self._list("Event", self._core.list_namespaced_event, namespace, field_selector=selector)
        return found

    def node(self, name: str) -> Object | None:
        try:
            return self._json(f"read node {name}", self._core.read_node, name)
        except _NotFoundError:
            return None

    def apply(self, manifest: Object) -> None:
        kind, metadata = manifest["kind"], manifest["metadata"]
        there = self._there(kind, metadata["namespace"], metadata["name"], manifest["apiVersion"])
        if there is None:
            return self._make(manifest)
        _check_whose(there, manifest)
        if kind == "Job":
            return None
        if there.get("immutable"):
            if there.get("data") == manifest["data"]:
                return None
            self.delete(kind, metadata["namespace"], metadata["name"], there["metadata"]["uid"])
            return self._make(manifest)
        # As it was read: what became another's since is not changed.
        read = {key: there["metadata"][key] for key in ("uid", "resourceVersion")}
        return self._write(
            "patch",
            {**manifest, "metadata": {**metadata, **read}},
            metadata["name"],
            force=True,
            _content_type="application/apply-patch+yaml",
        )

    def _there(self, kind: str, namespace: str, name: str, api: str = "") -> Object | None:
        try:
            found = self._json(f"read {kind} {namespace}/{name}", self._call("read", kind, api), name, namespace)
        except _NotFoundError:
            return None
        return {**found, "kind": kind}

    def _make(self, manifest: Object) -> None:
        """Of two that make it at once, one gets an error; server-side apply would write over the other's."""
        self._write("create", manifest)

    def _write(self, verb: str, manifest: Object, *name: str, **how: Any) -> None:
        kind, metadata, api = manifest["kind"], manifest["metadata"], manifest["apiVersion"]
        # Strict: what is misspelt in a pod template would be dropped without a word.
        how |= {"field_manager": FIELD_MANAGER, "field_validation": "Strict"}
        try:
            what = f"apply {kind} {metadata['namespace']}/{metadata['name']}"
            self._json(what, self._call(verb, kind, api), *name, metadata["namespace"], manifest, **how)
        except _NotFoundError as error:
            needed = f". The cluster serves no PodGroup of {api}, which gangScheduling of the job's profile needs."
            raise ClusterError(error.message + (needed if kind == "PodGroup" else "")) from error
        except ClusterError as error:
            answer = error.__cause__
            if not isinstance(answer, ApiException) or (reason := _refusal(answer.status, error.message)) is None:
                raise
            # Of what we make, only a Job has parts that a user writes.
            wrong = reason is Reason.INVALID_SPEC and kind != "Job"
            raise RefusedError(Reason.REFUSED if wrong else reason, error.message) from error

    def _call(self, verb: str, kind: str, api: str = "") -> Callable[..., Any]:
        snake = re.sub(r"(?<!^)([A-Z])", r"_\1", kind).lower()
        if api and (plural := PLAIN.get(kind)):
            call: Callable[..., Any] = getattr(_Plain(self._custom, api, plural), verb)
        else:
            call = getattr(self._groups[kind], f"{verb}_namespaced_{snake}")
        return call

    def relabel(self, kind: str, namespace: str, name: str, uid: str, labels: Mapping[str, str]) -> None:
        patch = {"metadata": {"uid": uid, "labels": labels}}
        how = {"field_manager": FIELD_MANAGER, "_content_type": "application/merge-patch+json"}
        with contextlib.suppress(_NotFoundError):
            self._json(f"label {kind} {namespace}/{name}", self._call("patch", kind), name, namespace, patch, **how)

    def delete(self, kind: str, namespace: str, name: str, uid: str, *, force: bool = False) -> None:
        what = f"delete {kind} {namespace}/{name}"
        # Foreground: a Job is gone only when its pods are.
        options = client.V1DeleteOptions(
            propagation_policy="Foreground" if kind == "Job" else "Background",
            grace_period_seconds=0 if force else None,
            preconditions=client.V1Preconditions(uid=uid),
        )
        try:
            self._json(what, self._call("delete", kind), name, namespace, body=options)
        except _NotFoundError:
            return
        except ClusterError:
            there = self._there(kind, namespace, name)
            if there is not None and there["metadata"]["uid"] == uid:
                raise

    def delete_job(self, job: Object) -> None:
        options = client.V1DeleteOptions(
            propagation_policy="Background", preconditions=client.V1Preconditions(uid=job["metadata"]["uid"])
        )
        self._on_this(job, "delete", self._custom.delete_namespaced_custom_object, body=options)

    def patch_status(self, job: Object, status: Mapping[str, Any]) -> bool:
        patch = [
            {"op": "test", "path": "/metadata/uid", "value": job["metadata"]["uid"]},
            {"op": "add", "path": "/status", "value": status},
        ]
        return self._on_this(
            job,
            "write the status of",
            self._custom.patch_namespaced_custom_object_status,
            patch,
            field_manager=FIELD_MANAGER,
            _content_type="application/json-patch+json",
        )

    def _on_this(self, job: Object, what: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
        """A call on one FineTuneJob that the API server refuses if another one has its name by now. False: it did."""
        namespace, name = job["metadata"]["namespace"], job["metadata"]["name"]
        what = f"{what} FineTuneJob {namespace}/{name}"
        place = (manifests.GROUP, manifests.VERSION, namespace, manifests.PLURAL, name)
        try:
            self._json(what, call, *place, *args, **kwargs)
        except _NotFoundError:
            return False
        except ClusterError:
            if is_same(self.finetunejob(namespace, name), job):
                raise
            return False
        return True

    def event(self, job: Object, kind: str, reason: str, message: str) -> None:
        metadata = job["metadata"]
        now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        body = {
            "metadata": {"name": f"{metadata['name']}.{uuid.uuid4().hex[:16]}", "namespace": metadata["namespace"]},
            "involvedObject": {
                "apiVersion": manifests.API_VERSION,
                "kind": manifests.KIND,
                "name": metadata["name"],
                "namespace": metadata["namespace"],
                "uid": metadata["uid"],
            },
            "reason": reason,
            "message": message[:1024],
            "type": kind,
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
            "source": {"component": FIELD_MANAGER},
            "reportingComponent": f"{manifests.GROUP}/operator",
            "reportingInstance": FIELD_MANAGER,
        }
        try:
            self._json("record an event", self._core.create_namespaced_event, metadata["namespace"], body)
        except ClusterError as error:
            log.warning("%s", error.message)

    def events_of(self, pod: Object) -> list[Object]:
        selector = f"involvedObject.uid={pod['metadata']['uid']}"
        with contextlib.suppress(ClusterError):  # a job runs as well without being explained
            return self._list(
                "Event", self._core.list_namespaced_event, pod["metadata"]["namespace"], field_selector=selector
            )
        return []

    def progress(self, pod: Object) -> Object | None:
        metadata = pod["metadata"]
        try:
            if self._progress_through == "apiserver":
                answer: Any = self._core.connect_get_namespaced_pod_proxy_with_path(
                    f"{metadata['name']}:{HTTP_PORT}",
                    metadata["namespace"],
                    "progress",
                    _preload_content=False,
                    _request_timeout=PROGRESS_TIMEOUT,
                )
                return json.loads(answer.data)
            address = (pod.get("status") or {}).get("podIP")
            if not address:
                return None
            host = f"[{address}]" if ":" in address else address
            with self._direct.open(f"http://{host}:{HTTP_PORT}/progress", timeout=PROGRESS_TIMEOUT) as reply:
                return json.load(reply)
        except (ApiException, urllib3.exceptions.HTTPError, OSError, ValueError):
            return None

    def logs(self, namespace: str, pod: str, container: str, lines: int) -> list[str]:
        try:
            answer: Any = self._core.read_namespaced_pod_log(
                pod,
                namespace,
                container=container,
                tail_lines=lines,
                _preload_content=False,
                _request_timeout=TIMEOUT,
            )
            return end_of_log(answer.stream(LOG_BYTES), lines)
        except (ApiException, urllib3.exceptions.HTTPError):
            return []

    def watch_pods(self, namespace: str | None, stop: threading.Event) -> Iterator[tuple[str, str]]:
        """(namespace, name of the FineTuneJob) for every change of a worker pod. The API server selects by label:
        pods of others never cross the wire. Ends when ``stop`` is set; broken watches are taken up again."""
        backoff = 1.0
        while not stop.is_set():
            stream = watch.Watch()
            arguments = {"label_selector": manifests.LABEL_JOB, "timeout_seconds": 300}
            try:
                if namespace is None:
                    events = stream.stream(self._core.list_pod_for_all_namespaces, **arguments)
                else:
                    events = stream.stream(self._core.list_namespaced_pod, namespace, **arguments)
                for event in events:
                    if stop.is_set():
                        return
                    metadata = event["raw_object"]["metadata"]
                    yield metadata["namespace"], metadata["labels"][manifests.LABEL_JOB]
                    backoff = 1.0
            except (ApiException, urllib3.exceptions.HTTPError, KeyError, ValueError) as error:
                log.warning("the watch of pods broke (%s); again in %.0f s", error, backoff)
                stop.wait(backoff)
                backoff = min(60.0, backoff * 2)

    def _json(self, what: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Object:
        try:
            answer = call(*args, _preload_content=False, _request_timeout=TIMEOUT, **kwargs)
            return json.loads(answer.data) if answer.data else {}
        except ApiException as error:
            message = f"Could not {what}: {_reason(error)}"
            raise (_NotFoundError if error.status == 404 else ClusterError)(message) from error
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise ClusterError(f"Could not {what}: the API server cannot be reached ({error}).") from error


def end_of_log(parts: Iterable[bytes], lines: int) -> list[str]:
    """The last lines of a text, out of its last LOG_BYTES. The server's own limit of bytes keeps the beginning of the
    last lines, and a progress bar is one line without end; why a process ended stands at the end."""
    end, cut = b"", False
    for part in parts:
        end += part
        cut = cut or len(end) > LOG_BYTES
        end = end[-LOG_BYTES:]
    found = end.decode(errors="replace").splitlines()
    whole = found[1:] if cut and len(found) > 1 else found
    return [line[:LINE_LENGTH] for line in whole[-lines:]]


class _Plain:
    """Objects of one kind as they are written. The client's typed calls refuse what their own models do not hold:
    fields of a newer Kubernetes, ``cpu: 4`` where they want text, and what is misspelt, which the API server names."""

    def __init__(self, custom: client.CustomObjectsApi, api: str, plural: str) -> None:
        self._custom = custom
        group, _, version = api.partition("/")
        self._place = (group, version), plural

    def read(self, name: str, namespace: str, **how: Any) -> Any:
        api, plural = self._place
        return self._custom.get_namespaced_custom_object(*api, namespace, plural, name, **how)

    def create(self, namespace: str, body: Object, **how: Any) -> Any:
        api, plural = self._place
        return self._custom.create_namespaced_custom_object(*api, namespace, plural, body, **how)

    def patch(self, name: str, namespace: str, body: Object, **how: Any) -> Any:
        api, plural = self._place
        return self._custom.patch_namespaced_custom_object(*api, namespace, plural, name, body, **how)


class _NotFoundError(ClusterError):
    pass


def _refusal(status: int | None, message: str) -> Reason | None:
    """Why the API server does not accept an object; None for what may pass, and for rights the operator lacks."""
    if status == 403 and re.search(r'User "[^"]*" cannot ', message):
        return None
    if status == 403 and "exceeded quota" in message:
        return Reason.QUOTA_EXCEEDED
    # A webhook chooses the code it answers with; a policy answers 422.
    if status == 403 or (status in (400, 422) and re.search(r"denied (the )?request", message)):
        return Reason.REFUSED
    return Reason.INVALID_SPEC if status in (400, 413, 422) else None


def _check_whose(there: Object, manifest: Object) -> None:
    """Raises where an object under a name we need is not of the FineTuneJob the manifest is made for."""
    kind, metadata = there["kind"], there["metadata"]
    owner, wanted = controller_of(there), controller_of(manifest)
    if owner.get("uid") == wanted["uid"]:
        return
    if owner.get("kind") == manifests.KIND and owner.get("name") == wanted["name"]:
        gone = f"Clearing what is left of an earlier job of this name: {kind} {metadata['name']}."
        raise RefusedError(Reason.NO_PODS, gone)
    whose = f"It belongs to {owner['kind']} {owner['name']}." if owner else "It belongs to no other object."
    if not owner and (metadata.get("labels") or {}).get(manifests.LABEL_JOB) == wanted["name"]:
        whose = "An earlier FineTuneJob of this name left it behind (kubectl delete --cascade=orphan, or a restore)."
    raise RefusedError(
        Reason.NAME_TAKEN,
        f"{kind} {metadata['name']} is there already, and is not this job's. {whose} It is neither changed nor "
        f"deleted. If nobody needs it, delete it (kubectl delete {kind.lower()} {metadata['name']} -n "
        f"{metadata['namespace']}); otherwise give the FineTuneJob another name.",
    )


def _reason(error: ApiException) -> str:
    """The API server's own words."""
    try:
        message = json.loads(error.body or "").get("message", "")
    except (ValueError, AttributeError):
        message = ""
    return f"{error.status} {message or error.reason}"
